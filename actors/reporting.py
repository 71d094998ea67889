"""What a run shows while it runs: a progress line, metric rows, TensorBoard, wandb, Ray metrics, and contact sheets.

Sheets are drawn in a task beside the data, so that the driver never holds a picture.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote

import numpy as np
import ray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ray.util.metrics import Gauge

from rlhf.data.clips import write_mp4
from rlhf.data.sources import seen_source
from rlhf.errors import last_line
from rlhf.runs.durable import durable
from rlhf.runs.sheets import Cell, contact_sheet, strip
from rlhf.runs.tracking import FileTracker
from rlhf.runs.wandb_run import WandbRun
from rlhf.tables import TrackingTable
from rlhf.types import Pair, Prompt, Score

SHEET_ROWS = 8
FETCH_TIMEOUT_S = 60.0
SHOWN = {
    "reward/mean": ("reward", ".4f"),
    "train/loss": ("loss", ".4f"),
    "train/implicit_acc": ("acc", ".2f"),
    "filter/pass_rate": ("pass", ".2f"),
    "rollout/staleness": ("staleness", ".1f"),
}
"""What the progress line shows of an update, where there is such a scalar: its word and format."""


class Reporter:
    """The run's tracker. `resumed_at` is the committed step that it goes on from."""

    def __init__(self, folder: Path, total_steps: int, resumed_at: int | None, tracking: TrackingTable):
        self._board = folder / "tensorboard" if "tensorboard" in tracking.report_to else None
        self._files = FileTracker(folder, resumed_at=resumed_at, board=self._board is not None)
        self._wandb = WandbRun(folder, tracking.project) if "wandb" in tracking.report_to else None
        self._folder, self._total = folder, total_steps
        self._gauges: dict[str, Gauge] = {}
        self._started = self._last = monotonic()
        self._first = resumed_at or 0
        self._sheets: list[ray.ObjectRef] = []
        self._base: ray.ObjectRef | None = None
        """The sheet of the base's edits, which later ones show beside their own."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars; those of an update are also printed as one line."""
        now = monotonic()
        if "train/lr" in scalars:
            scalars, self._last = {**scalars, "time/step": now - self._last}, now
            self._say(self._line(step, scalars, now))
        elif any(name.startswith("eval/") for name in scalars):
            self._say(f"  eval at step {step}: " + ", ".join(f"{n[5:]} {v:.4f}" for n, v in scalars.items()))
        self._files.log(step, scalars)
        if self._wandb:
            self._wandb.log(step, scalars)
        for name, value in scalars.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"rlhf_{name.replace('/', '_')}", name, tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": quote(str(self._folder))})  # a tag takes ASCII only

    def _say(self, line: str) -> None:
        print(line, flush=True)
        with (self._folder / "run.log").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def _line(self, step: int, scalars: Mapping[str, float], now: float) -> str:
        left = int((now - self._started) / max(step - self._first, 1) * (self._total - step))
        eta = f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        shown = [f"{word} {scalars[name]:{form}}" for name, (word, form) in SHOWN.items() if name in scalars]
        return f"step {step}/{self._total}  {'  '.join(shown)}  {scalars['time/step']:.1f} s  {eta}"

    def pairs(self, step: int, pairs: Sequence[Pair]) -> None:
        """samples/step_NNNNNN.png: source | winner | loser."""
        rows = []
        for pair in pairs[:SHEET_ROWS]:
            winner = (f"winner {ahead(pair)}", pair.winner.media, pair.winner_score)
            rows.append((pair.prompt, [winner, ("loser", pair.loser.media, pair.loser_score)]))
        self._draw(f"step_{step:06d}", step, rows)

    def edits(self, step: int, name: str, prompts: Sequence[Prompt], answers: Sequence[tuple[Any, Any]]) -> None:
        """samples/eval_NAME_step_NNNNNN.png: source | the base's edit at the same noise | edit."""
        rows = [(prompt, [(name, *answer)]) for prompt, answer in zip(prompts, answers, strict=True)]
        self._draw(f"eval_{name}_step_{step:06d}", step, rows[:SHEET_ROWS], held_out=True)

    def _draw(self, name: str, step: int, rows: list[Any], held_out: bool = False) -> None:
        if self._sheets:
            done, self._sheets = ray.wait(self._sheets, num_returns=len(self._sheets), timeout=0)
            self._collect(done)
        file = self._folder / "samples" / f"{name}.png"
        sheet = draw_sheet.remote(file, self._board, step, rows, held_out, self._base if held_out else None)
        self._base = sheet if held_out and step == 0 else self._base
        self._sheets.append(sheet)

    def _collect(self, drawn: list[ray.ObjectRef]) -> None:
        """A sheet that could not be drawn is told, and does not end the run."""
        for sheet in drawn:
            try:
                ray.get(sheet, timeout=FETCH_TIMEOUT_S)
            except ray.exceptions.RayError as error:
                self._say(f"  a contact sheet could not be drawn: {last_line(error)}")

    def close(self) -> None:
        """Wait for the last sheets. For the end of a run; one that fails or is stopped does not wait."""
        self._collect(self._sheets)
        self._files.close()
        if self._wandb:
            self._wandb.close()


@ray.remote(num_cpus=0, max_retries=0)
def draw_sheet(file: Path, board: Path | None, step: int, rows: list[Any], held_out: bool, base_sheet: None) -> None:
    """Draw one contact sheet as PNG and, with a `board`, as a TensorBoard image; of videos some frames, beside their MP4 files.

    rows: (prompt, [(label, media reference, answer)]).

    held_out: the base's edits are kept as files, since a run that is resumed samples none, and shown beside later ones.
    base_sheet: of the same run, for which Ray waits.
    """
    from torch.utils.tensorboard import SummaryWriter

    base = file.parent / "base"
    base.mkdir(parents=True, exist_ok=True)
    cells = []
    for number, (prompt, entries) in enumerate(rows, start=1):
        caption = f"source {_line(prompt.key)}\n{_line(prompt.instruction)}"
        row = [(seen_source(source, prompt.geometry)[0], caption) for source in prompt.sources]
        for label, media, answer in entries:
            frames = np.asarray(ray.get(media, timeout=FETCH_TIMEOUT_S))
            if len(frames) > 1:
                write_mp4(file.with_name(f"{file.stem}_{number}_{label.split()[0]}.mp4"), frames)
            row.append((strip(frames), f"{label}\n{describe(answer)}"))
        if held_out:
            row = with_base(row, base / f"{number}.png", is_base=step == 0)
        cells.append(row)
    sheet = contact_sheet(cells)
    sheet.save(file)
    shows = file.stem.split("step")[0].strip("_") or "pairs"
    if board:
        with SummaryWriter(str(board), filename_suffix=f".{file.stem}") as writer:
            writer.add_image(f"samples/{shows}", np.asarray(sheet), step, dataformats="HWC")


def with_base(row: list[Cell], kept: Path, is_base: bool) -> list[Cell]:
    """The row of a held-out prompt with the base's edit before its last picture, or, of the base itself, as it is."""
    *others, last = row
    if not is_base:
        with Image.open(kept) as picture:
            return [*others, (np.asarray(picture), picture.info["caption"]), last]
    words = PngInfo()
    words.add_itxt("caption", last[1])
    with durable(kept) as partial:
        Image.fromarray(last[0]).save(partial, format="PNG", pnginfo=words)
    return row


def _line(text: str) -> str:
    return " ".join(text.split())


def ahead(pair: Pair) -> str:
    """By how much the winner's scaled rewards are above the loser's, in all and each."""
    return f"by {pair.margin:.2f}: " + ", ".join(f"{name} {value:+.2f}" for name, value in pair.margins.items())


def describe(answer: Any) -> str:
    """What judges say; None: none was asked."""
    if answer is None:
        return ""
    if not isinstance(answer, Score):
        return f"not judged: {answer.reason}"
    verdict = "PASS" if answer.verdict.valid else "FAIL"
    chance = answer.verdict.pass_probability
    rewards = "  ".join(f"{name} {value:.4f}" for name, value in answer.rewards.items())
    return f"{verdict}{'' if chance is None else f' p={chance:.2f}'}\n{rewards or _line(answer.verdict.reason)}"
