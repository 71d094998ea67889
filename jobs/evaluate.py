"""Base against tuned: does a training run's outcome please the judges more than the model that it began with?

    python -m jobs.evaluate --config jobs/configs/evaluate.toml --tuned.denoiser runs/NAME/v0/final/transformer [--dry-run]

Paints every prompt with both, from the same noise, has every chosen judge score both pictures, and writes to `out`:
index.html (opens from disk), results.json, config.toml and pictures/. The same command goes on where a stopped
evaluation left off: pictures that are painted stay.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import ray
import xxhash

from actors import placement
from actors.asking import Scorer
from actors.painters import paint_all, painter_role
from actors.scoring import asking_role, judge_all, text_of
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster, free_resources
from jobs.running import guarded
from rlhf.data.records import BadInput, Problem
from rlhf.errors import Refused
from rlhf.evaluation.config import EvaluateConfig
from rlhf.evaluation.duels import Evaluation, judge_result, source_result
from rlhf.evaluation.folder import check_out, claim
from rlhf.evaluation.page import page
from rlhf.evaluation.prompts import Prompts, read_evaluation
from rlhf.rollouts.reliability import JudgeUnreliable
from rlhf.runs.folder import write_durably
from serve_apps import deploy


def main() -> None:
    arguments = parse(EvaluateConfig, description=__doc__ or "")
    config = arguments.config
    prompts = checked(config)
    if arguments.dry_run:
        print(resolved_toml(config))
        print(f"{len(prompts.prompts)} prompts × {config.sampling.seeds} seeds × (base, tuned) → {config.out}")
        check_placement(config)
        return
    print(f"results: {evaluate(config, prompts) / 'index.html'}")


def checked(config: EvaluateConfig) -> Prompts:
    """The prompts, after every check that needs neither a model nor a cluster. Raises Refused."""
    check_out(Path(config.out))
    found = read_evaluation(config)
    for problem in found.left_out:
        print(f"left out: {problem}", flush=True)
    mute = []
    for prompt in found.prompts:
        try:
            text_of(config, prompt)
        except Refused as error:
            what = f"{prompt.image_id!r} leaves the judges nothing to read: {error}"
            mute.append(Problem(file=config.data.path, line=None, field="prompt", what=what, remedy="write a prompt"))
    if mute:
        raise BadInput(mute)
    deploy.check_sources(config.judges, config.reward.names)
    return found


def check_placement(config: EvaluateConfig) -> None:
    """Print what painting and then judging need; raise NotEnoughResources, with the table, where either does not fit."""
    free = free_resources(config.cluster)
    judging = [asking_role(), *placement.judge_roles(config.judges, config.reward.names)]
    for needed in ([painter_role(config)], judging):
        print(placement.table(needed, free), flush=True)
    for needed in ([painter_role(config)], judging):
        placement.check(needed, free)


def evaluate(config: EvaluateConfig, prompts: Prompts) -> Path:
    """Run (or go on) to the end; returns `out`."""
    out = Path(config.out)
    with ExitStack() as stack:
        stack.enter_context(claim(config, prompts.prompts, resolved_toml(config)))
        name = f"evaluate-{xxhash.xxh3_64_hexdigest(str(out.resolve()).encode())[:6]}"
        stack.enter_context(cluster(config.cluster, namespace=name))
        check_placement(config)
        placement.check_shared("out", out)
        paint_all(config, prompts.prompts, say)
        names = config.reward.names
        stack.callback(deploy.undeploy, name, names)
        judges_up = deploy.deploy(config.judges, config.serve, names, name)
        say(f"judges: {', '.join(deploy.addresses(config.judges, names, judges_up).values())}")
        scorer = ray.remote(Scorer).options(num_cpus=placement.JUDGES_CPUS, max_concurrency=1000)
        duels, failed = judge_all(config, prompts.prompts, scorer.remote(config.judges, names, judges_up.apps), say)
        results = {judge: judge_result(judge, duels, config.seed) for judge in names}
        if unscored := [judge for judge, result in results.items() if result is None]:
            reason = next(failure.reason for failure in reversed(failed) if failure.judge == unscored[0])
            raise JudgeUnreliable(f"judge {unscored[0]!r} scored no pair of pictures; the last reason: {reason}")
        evaluation = Evaluation(
            model=config.model.denoiser or config.model.path,
            tuned=str(config.tuned.denoiser or config.tuned.lora),
            steps=config.sampling.steps,
            seed=config.seed,
            judges={judge: result for judge, result in results.items() if result},
            source=source_result(duels, config.seed),
            duels=duels,
            failed=failed,
            left_out=[str(problem) for problem in prompts.left_out],
        )
        (out / "index.html").write_text(page(evaluation), encoding="utf-8")
        document = asdict(evaluation) | {"config": config.model_dump(mode="json")}
        write_durably(out / "results.json", json.dumps(document, indent=1, allow_nan=False))
    for judge, result in evaluation.judges.items():
        say(f"{judge}: win rate {result.win_rate.value:.3f}, mean difference {result.difference.value:+.4g}")
    return out


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_main(guarded(main, "with the pictures that are painted"))
