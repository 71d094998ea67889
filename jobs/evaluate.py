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

import xxhash

from actors import placement
from actors.judging import READS_AT_ONCE, Judging
from actors.pictures import judge_pictures, paint_all
from jobs.cli import parse, resolved_toml, run_main, say
from jobs.launch import cluster, free_resources
from jobs.recipes import EvaluateRecipe
from rlhf.evaluation.duels import Duel, Evaluation, FailedScore, judge_result, source_result
from rlhf.evaluation.folder import check_out, claim, painting
from rlhf.evaluation.page import page
from rlhf.evaluation.prompts import Prompts, read_evaluation
from rlhf.models import load_family
from rlhf.models.checks import check_sampling
from rlhf.rewards.questions import check_prompts
from rlhf.rollouts.reliability import JudgeUnreliable
from rlhf.runs.durable import write_durably
from serve_apps import deploy


def main() -> None:
    recipe, is_dry = parse(EvaluateRecipe, description=__doc__ or "")
    prompts = checked(recipe)
    if is_dry:
        say(resolved_toml(recipe))
        say(f"{len(prompts.prompts)} prompts × {recipe.sampling.seeds} seeds × (base, tuned) → {recipe.out}")
        check_placement(recipe)
        return
    say(f"results: {evaluate(recipe, prompts) / 'index.html'}")


def checked(recipe: EvaluateRecipe) -> Prompts:
    """The prompts, after every check that needs neither a model nor a cluster. Raises Refused."""
    check_out(Path(recipe.out))
    found = read_evaluation(recipe.model, recipe.tuned, recipe.data)
    check_sampling(load_family(recipe.model), recipe.sampling)
    for problem in found.left_out:
        say(f"left out: {problem}")
    check_prompts(recipe.judges, recipe.reward, recipe.data, found.prompts)
    deploy.check_sources(recipe.judges, recipe.serve, recipe.reward.names)
    return found


def check_placement(recipe: EvaluateRecipe) -> None:
    """Print what painting and then judging need; raise NotEnoughResources, with the table, where either does not fit."""
    sizes = placement.ModelSizes(load_family(recipe.model))
    paints = [placement.sampler_role(sizes, recipe.samplers, encodes=True)]
    judges = [placement.judging_role(READS_AT_ONCE), *placement.judge_roles(recipe.judges, recipe.reward.names)]
    free = free_resources(recipe.cluster)
    for roles in (paints, judges):
        say(placement.table(roles, free))
    for roles in (paints, judges):
        placement.check(roles, free)


def evaluate(recipe: EvaluateRecipe, prompts: Prompts) -> Path:
    """Run (or go on) to the end; returns `out`. Raises JudgeUnreliable, JudgingFailed."""
    out = Path(recipe.out)
    with ExitStack() as stack:
        ours = painting(recipe.model, recipe.tuned, recipe.sampling, prompts.prompts, recipe.seed)
        stack.enter_context(claim(out, ours, resolved_toml(recipe)))
        name = f"evaluate-{xxhash.xxh3_64_hexdigest(str(out.resolve()).encode())[:6]}"
        stack.enter_context(cluster(recipe.cluster, namespace=name))
        check_placement(recipe)
        placement.check_shared("out", out)
        tables = (recipe.model, recipe.tuned, recipe.sampling, recipe.samplers)
        paint_all(*tables, prompts.prompts, out, recipe.seed, say)
        judges, names = recipe.judges, recipe.reward.names
        stack.callback(deploy.undeploy, name, names)
        judges_up = deploy.deploy(judges, recipe.serve, names, name)
        say(f"judges: {', '.join(deploy.addresses(judges, names, judges_up).values())}")
        judging = Judging(judges, names, judges_up.apps, empty_prompt=recipe.reward.empty_prompt)
        stack.callback(judging.close)
        duels, failed = judge_pictures(
            out,
            prompts.prompts,
            judging,
            names,
            seeds=recipe.sampling.seeds,
            edits=max(load_family(recipe.model).source_counts) > 0,
            max_failure_rate=judges.max_failure_rate,
            log=say,
        )
        found = results(recipe, prompts, duels, failed)
        (out / "index.html").write_text(page(found), encoding="utf-8")
        document = asdict(found) | {"config": recipe.model_dump(mode="json")}
        write_durably(out / "results.json", json.dumps(document, indent=1, allow_nan=False))
    for name, result in found.judges.items():
        say(f"{name}: win rate {result.win_rate.value:.3f}, mean difference {result.difference.value:+.4g}")
    return out


def results(recipe: EvaluateRecipe, prompts: Prompts, duels: list[Duel], failed: list[FailedScore]) -> Evaluation:
    """What the scores add up to. Raises JudgeUnreliable for a judge that scored no pair."""
    found = {name: judge_result(name, duels, recipe.seed) for name in recipe.reward.names}
    if unscored := [name for name, result in found.items() if result is None]:
        reason = next(failure.reason for failure in reversed(failed) if failure.judge == unscored[0])
        raise JudgeUnreliable(f"judge {unscored[0]!r} scored no pair of pictures; the last reason: {reason}")
    return Evaluation(
        model=recipe.model.denoiser or recipe.model.path,
        tuned=str(recipe.tuned.denoiser or recipe.tuned.lora),
        steps=recipe.sampling.steps,
        seed=recipe.seed,
        judges={name: result for name, result in found.items() if result},
        source=source_result(duels, recipe.seed),
        duels=duels,
        failed=failed,
        left_out=[str(problem) for problem in prompts.left_out],
    )


if __name__ == "__main__":
    run_main(main, "the same command goes on with the pictures that are painted")
