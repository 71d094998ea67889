"""Online DPO on a folder of product photos: the main job.

    python -m jobs.online_dpo --config jobs/configs/online_dpo_hps_ctr.toml [--section.key VALUE …] [--dry-run]

Checks configuration and data, encodes what the cache lacks, deploys the judges, starts samplers and trainer ranks, and
runs the loop of `rlhf.loops.online_dpo`. The same command goes on where a stopped run left off.
"""

from contextlib import ExitStack
from pathlib import Path

import ray
from ray import serve

from actors import placement
from actors.judges import Judges, reward_text
from actors.online_trainer import OnlineTrainer
from actors.reporting import Reporter
from actors.rollouts import Rollouts
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster, dashboard, free_resources
from jobs.preprocess import Data, preprocess, prompts_of, read_data
from jobs.running import check_disk, guarded, train_until_done, unique_name
from rlhf.data.prompts import PromptStream
from rlhf.loops.online_dpo import online_dpo
from rlhf.runs.folder import RunFolder
from rlhf.tables import OnlineDPOConfig
from rlhf.types import Prompt
from serve_apps import deploy


def main() -> None:
    arguments = parse(OnlineDPOConfig, description=__doc__ or "")
    config = arguments.config
    data = read_data(config)
    if data.left_out():
        print(data.left_out(), flush=True)
    if arguments.dry_run:
        dry_run(config, data)
    else:
        print(f"results: {run(config, data)}")


def dry_run(config: OnlineDPOConfig, data: Data) -> None:
    """Print the resolved recipe and the placement table; raise where the run would be refused. Starts nothing."""
    print(resolved_toml(config))
    check_texts(config, prompts_of(config, data.all))
    deploy.check_sources(config.judges, config.judge_names)
    needed, free = placement.roles(config), free_resources(config.cluster)
    print(placement.table(needed, free))
    check_disk(config)
    placement.check(needed, free)


def check_texts(config: OnlineDPOConfig, prompts: list[Prompt]) -> None:
    """Every prompt must give the rewards that read one a text. Raises Refused for the first that does not."""
    if any(config.judges[name].reads_prompt for name in config.reward.names):
        for prompt in prompts:
            reward_text(prompt, config.reward.hps.empty_prompt)


def run(config: OnlineDPOConfig, data: Data) -> Path:
    """Run (or resume) to the end; returns the run's folder."""
    deploy.check_sources(config.judges, config.judge_names)
    check_texts(config, prompts_of(config, data.all))
    with cluster(config.cluster, namespace=config.run.name), ExitStack() as stack:
        folder = RunFolder.claim(config.run.dir, config.run.name, resolved_toml(config), config.run.resume)
        stack.callback(folder.release)
        print(
            f"run folder: {folder.path}{' (resumed)' if folder.resumed else ''}; dashboard: {dashboard()}", flush=True
        )
        name = unique_name(config, folder)
        if data.left_out():
            (folder.path / "left_out.txt").write_text(data.left_out() + "\n", encoding="utf-8")
        check_placement(config, name)
        placement.check_shared("run.dir", folder.path)
        check_disk(config, folder.path)
        prompts = preprocess(config, data.all, lambda line: print(line, flush=True))
        train, held_out = prompts[: len(data.train.rows)], prompts[len(data.train.rows) :]
        group = placement.reserve(placement.roles(config)[:2])  # trainer ranks, then samplers
        stack.callback(ray.util.remove_placement_group, group)
        stack.callback(deploy.undeploy, name, config.judge_names)
        judges_up = deploy.start(
            config.judges, config.serve, config.judge_names, name
        )  # after the group: judges take what trainer and samplers leave

        def new_judges() -> ray.actor.ActorHandle:
            actor = ray.remote(Judges).options(num_cpus=placement.JUDGES_CPUS, max_concurrency=1000)
            return actor.remote(config, judges_up.apps)

        deploy.wait(judges_up, config.judges.deploy_timeout_s)
        addresses = deploy.addresses(config.judges, config.judge_names, judges_up)
        print(f"judges: {', '.join(addresses.values())}", flush=True)
        rollouts = Rollouts(config, PromptStream(train, config.run.seed), new_judges, group)
        stack.callback(rollouts.close)
        held_out = held_out[: config.eval.max_prompts]

        def attempt() -> None:
            with ExitStack() as inner:
                tracker = Reporter(
                    folder.path, config.trainer.max_train_steps, folder.last_committed(), fit=config.data.fit
                )
                trainer = OnlineTrainer(config, folder.fence, group, meanwhile=rollouts.pump)
                inner.callback(trainer.kill)
                online_dpo(config, folder, rollouts, trainer, tracker, held_out)
                tracker.close()

        train_until_done(folder, attempt)
        return folder.path


def check_placement(config: OnlineDPOConfig, name: str) -> None:
    """Refuse, with a table, a run that does not fit; judges that an earlier start left running are not counted twice."""
    ours = config.judges.to_deploy(config.judge_names)
    running = serve.status().applications if ours else {}
    orphans = {f"judge {judge}" for judge in ours if deploy.app_name(name, judge) in running}
    needed = [role for role in placement.roles(config) if role.name not in orphans]
    free = free_resources(config.cluster)
    print(placement.table(needed, free), flush=True)
    placement.check(needed, free)


if __name__ == "__main__":
    run_main(guarded(main))
