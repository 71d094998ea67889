"""Train a CTR model from a click log: python -m jobs.train_ctr --config jobs/configs/train_ctr.toml

Reads a CSV with the columns of FEAST's CTR scripts (every bad row is reported before anything loads), trains on
`train.ranks` Ray actors of `train.num_cpus` and `train.num_gpus` each, and writes to `output` the checkpoint folder that
judges.ctr.path takes, with the figures of the held-out rows (metrics.json) and their plots (calibration.png,
predicted_vs_actual.png) beside the weights. Uses a running cluster (cluster.address, RAY_ADDRESS) or starts and
ends one of its own.
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import ray

from actors.ctr_group import CTRGroup
from actors.placement import Role, reserve
from jobs.cli import parse, resolved_toml, run_main, say
from jobs.launch import cluster, free_resources
from rlhf.data.records import BadInput, Problem
from rlhf.errors import Refused
from rlhf.rewards.ctr.build import check_backbones
from rlhf.rewards.ctr.clicks import Click, Rows, read_clicks, split
from rlhf.rewards.ctr.config import CTRTrainConfig, TrainCTRConfig
from rlhf.rewards.ctr.training import fit, uses_binomial
from rlhf.runs.folder import made
from rlhf.types import seed_from


def train_ctr(config: TrainCTRConfig) -> Path:
    """Train and write `config.output`; returns it. Works inside a running Ray session or starts one of its own.

    Raises: BadInput (all bad rows), Refused (`output` exists, keys that do not fit the rows, a cluster without room),
    RankLost (a rank died, or `train.timeout_s` passed).
    """
    rows = load_rows(config)
    output = Path(config.output)
    made(output.parent, "output")
    with cluster(config.cluster, "train_ctr"), ExitStack() as stack:
        train = config.train
        check_room(train, ray.cluster_resources())
        role = Role(
            kind="trainer",
            name="CTR rank",
            count=train.ranks,
            num_cpus=train.num_cpus,
            num_gpus=train.num_gpus,
            nbytes=0.0,
        )
        placement = reserve([role], train.timeout_s)
        stack.callback(ray.util.remove_placement_group, placement)
        group = CTRGroup(config, rows, placement)
        stack.callback(group.kill)
        figures = fit(group.epoch, group.keep, train, say)
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix=".ctr-"))
        folder = Path(temporary) / "ctr"
        metrics = group.finish(folder) | figures
        metrics |= {"train_rows": float(len(rows.train)), "validation_rows": float(len(rows.validation))}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
        (folder / "train_ctr.toml").write_text(resolved_toml(config), encoding="utf-8")
        folder.rename(output)
    say(f"ctr {output} " + " ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return output


def load_rows(config: TrainCTRConfig) -> Rows:
    """Training, validation and held-out rows, after every check that needs no model.

    An output that already holds something is refused: a checkpoint is never overwritten.
    """
    if Path(config.output).exists():
        raise Refused(f"output = {config.output} exists and is never overwritten; choose another or remove it")
    check_backbones(config.model)
    problems: list[Problem] = []
    groups: list[list[Click]] = []
    for path in filter(None, (config.data.path, config.data.eval_path)):
        try:
            clicks, left_out = read_clicks(Path(path), config.data.on_bad_row)
            groups.append(clicks)
            if left_out:
                say("\n".join([f"left out {len(left_out)} problems of {path}:", *map(str, left_out)]))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    data, seed = config.data, config.seed
    if data.eval_path:
        trained = {click.image for click in groups[0]}
        if shared := sum(click.image in trained for click in groups[1]):
            raise Refused(
                f"{shared} of {len(groups[1])} pictures of data.eval_path = {data.eval_path!r} are in data.path = {data.path!r} "
                "too: hold out others"
            )
    train, held_out = groups if data.eval_path else split(groups[0], data.eval_fraction, seed, "data.eval_fraction")
    validation: list[Click] = []
    if data.validation_fraction:
        other = seed_from(seed, "validation")  # not the products that come after the held-out ones in their order
        train, validation = split(train, data.validation_fraction, other, "data.validation_fraction")
    rows = Rows(train=train, validation=validation, held_out=held_out)
    uses_binomial(rows, config.train)
    return rows


def check_room(train: CTRTrainConfig, have: dict[str, float]) -> None:
    """Raise Refused where a cluster of these resources can never hold all ranks."""
    for name, each in (("CPU", train.num_cpus), ("GPU", train.num_gpus)):
        if train.ranks * each > have.get(name, 0.0) + 1e-6:
            raise Refused(
                f"train.ranks = {train.ranks} × train.num_{name.lower()}s = {each:g} is more than the cluster's "
                f"{have.get(name, 0.0):g} {name}; lower them or add nodes"
            )


def main() -> None:
    config, is_dry = parse(TrainCTRConfig, description=__doc__ or "")
    if not is_dry:
        train_ctr(config)
        return
    rows, train = load_rows(config), config.train
    print(resolved_toml(config))
    validation, held_out = len(rows.validation), len(rows.held_out)
    print(f"{len(rows.train)} training rows, {validation} validation rows, {held_out} held-out rows")
    print(f"loss: {'binomial' if uses_binomial(rows, train) else 'compound'}")
    print(f"ranks: {train.ranks} × {train.num_cpus:g} CPU, {train.num_gpus:g} GPU")
    check_room(train, free_resources(config.cluster))


if __name__ == "__main__":
    run_main(main, "nothing was written")
