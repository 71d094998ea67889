"""A run's scalars in Weights & Biases, beside the files that are its record. See its documentation of `wandb.init`.

Account, server and mode come from its own settings: `wandb login`, WANDB_BASE_URL, WANDB_MODE=offline. Left out: pictures, which
are in the run's samples/, and uploads of weights.
"""

import secrets
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.errors import Refused, last_line
from rlhf.runs.durable import write_durably


def check_report_to(names: Sequence[str]) -> None:
    """Raise Refused where wandb is asked for and is not installed, or has no account and is not told to stay offline."""
    if "wandb" not in names:
        return
    asked = 'tracking.report_to has "wandb"'
    try:
        import wandb
    except ImportError as error:
        raise Refused(f'{asked}, which is not installed ({last_line(error)}): pip install "wandb==0.31.0"') from error
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise Refused(f"{asked}: {error} Or set WANDB_MODE=offline and `wandb sync` the run later") from error
    except ValueError as error:  # of pydantic, about a variable
        raise Refused(f"{asked}, whose settings it refuses; see its variables, such as WANDB_MODE: {error}") from error


def _id_of(folder: Path) -> str:
    """Drawn once and kept in the run's folder, so that a resume finds its chart and no other run does."""
    file = folder / "wandb_id"
    if not file.exists():
        write_durably(file, secrets.token_hex(8))
    return file.read_text()


class WandbRun:
    """The run `NAME/vN` of a project. A resume goes on with it: what it does over is drawn again."""

    def __init__(self, folder: Path, project: str):
        """folder: of the run; its config.toml is told, and offline what was not sent yet is kept in its wandb/."""
        import wandb

        settings = wandb.Settings(console="off", silent=True, save_code=False)
        self._run = wandb.init(
            project=project,
            name=f"{folder.parent.name}/{folder.name}",
            group=folder.parent.name,
            id=_id_of(folder),
            resume="allow",
            reinit="finish_previous",
            dir=folder,
            config=tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")  # its own steps may not go back, as those of a resume do

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """Wait until everything is written or sent, and end wandb's own processes."""
        import wandb

        self._run.finish()
        wandb.teardown()
