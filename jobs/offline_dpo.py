"""Offline preference tuning (Diffusion-DPO) or SFT on pairs that are already there, for any family.

    python -m jobs.offline_dpo --config jobs/configs/offline_dpo_sd15.toml [--section.key VALUE …] [--dry-run]

Checks every row, lets a judge relabel the pairs if `data.choice_model` names one, encodes what the cache lacks, starts the
trainer ranks, and runs the loop of `rlhf.loops.offline_dpo`. The same command goes on where a stopped run left off.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import ray

from actors import checks, placement
from actors.offline_trainer import OfflineTrainer
from actors.pair_encoders import PairFeed
from actors.reporting import Reporter
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster, dashboard, free_resources
from jobs.offline_feedback import relabel_by_judge
from jobs.offline_pairs import PairSets, encode_missing, read_pair_sets, refuse_other_pairs, say_batch
from jobs.running import check_disk, guarded, train_until_done, unique_name
from rlhf.data.stream import training_stream
from rlhf.loops.offline_dpo import offline_dpo
from rlhf.offline_config import OfflineDPOConfig
from rlhf.runs.folder import RunFolder
from serve_apps import deploy


def main() -> None:
    arguments = parse(OfflineDPOConfig, description=__doc__ or "")
    if arguments.dry_run:
        dry_run(arguments.config)
    else:
        print(f"results: {run(arguments.config)}")


def dry_run(config: OfflineDPOConfig) -> None:
    """Print the resolved recipe, the pairs and the placement table; raise where the run would be refused."""
    print(resolved_toml(config))
    say_batch(config)
    deploy.check_sources(config.judges, config.judge_names)
    needed, free = placement.offline_roles(config), free_resources(config.cluster)
    print(placement.table(needed, free))
    check_disk(config)
    print(read_pair_sets(config, partial(checks.in_threads, say)).report())
    placement.check(needed, free)


def run(config: OfflineDPOConfig) -> Path:
    """Run (or resume) to the end; returns the run's folder."""
    deploy.check_sources(config.judges, config.judge_names)
    with cluster(config.cluster, namespace=config.run.name), ExitStack() as stack:
        needed, free = placement.offline_roles(config), free_resources(config.cluster)
        say(placement.table(needed, free))
        placement.check(needed, free)
        pairs = read_pair_sets(config, partial(checks.on_cluster, config.preprocess, say))
        say(pairs.report())
        folder = RunFolder.claim(config.run.dir, config.run.name, resolved_toml(config), config.run.resume)
        stack.callback(folder.release)
        say(f"run folder: {folder.path}{' (resumed)' if folder.resumed else ''}; dashboard: {dashboard()}")
        placement.check_shared("run.dir", folder.path)
        check_disk(config, folder.path)
        say_batch(config)
        labelled = None
        if config.data.choice_model:
            labelled = relabel_by_judge(config, pairs, unique_name(config, folder), say)
            pairs = labelled.pairs
        refuse_other_pairs(pairs, folder)
        if pairs.left_out():
            (folder.path / "left_out.txt").write_text(pairs.left_out() + "\n", encoding="utf-8")
        if labelled:
            labelled.write_records(folder.path)
        encode_missing(config, pairs, say)
        train(config, folder, pairs, labelled.swapped if labelled else {})
        return folder.path


def train(config: OfflineDPOConfig, folder: RunFolder, pairs: PairSets, about_data: dict[str, float]) -> None:
    """The loop on a trainer group of its own; `about_data` is logged before the first step."""
    with ExitStack() as stack:
        group = placement.reserve([placement.trainer_role(config)])
        stack.callback(ray.util.remove_placement_group, group)

        def attempt() -> None:
            with ExitStack() as inner:
                tracker = Reporter(folder.path, config.trainer.max_train_steps, folder.last_committed())
                if about_data and folder.last_committed() is None:
                    tracker.log(0, about_data)
                feed = None
                if config.data.latents == "on_the_fly" and pairs.index is not None:
                    sizes = tuple(pairs.index.block_sizes().tolist())
                    feed = PairFeed(
                        config, pairs.training.place.path, training_stream(config.data, sizes, config.run.seed)
                    )
                    inner.callback(feed.close)
                held_out = pairs.evaluation.place if pairs.evaluation else None
                trainer = OfflineTrainer(config, folder.fence, group, pairs.training.place, held_out, feed)
                inner.callback(trainer.kill)
                offline_dpo(config, folder, trainer, tracker)
                tracker.close()

        train_until_done(folder, attempt)


def say(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)


if __name__ == "__main__":
    run_main(guarded(main))
