"""Judges as a service, without a run: `python -m jobs.serve --config jobs/configs/serve.toml`, until Ctrl-C.

Deploys every judge of the recipe that has a source, waits until each has answered a real request, and prints their
addresses. When it ends, they are deleted. `serve deploy serve_apps/serve.yaml` is the same without a process that stays.
"""

import sys
import time

from ray import serve

from actors import placement
from jobs.cli import parse, resolved_toml, run_main
from jobs.cluster import cluster, free_resources
from jobs.recipes.serve import ServeRecipe
from serve_apps import deploy

POLL_S = 5.0


def main() -> None:
    arguments = parse(ServeRecipe, description=__doc__ or "")
    config = arguments.config
    deploy.check_sources(config.judges, config.judge_names)
    needed = placement.judge_roles(config.judges, config.judge_names)
    if arguments.dry_run:
        print(resolved_toml(config))
        print(placement.table(needed, free_resources(config.cluster)))
        placement.check(needed, free_resources(config.cluster))
        return
    try:
        with cluster(config.cluster, config.name):
            deploy.check_free(config.judge_names, config.name)
            placement.check(needed, free_resources(config.cluster))
            serve_until_stopped(config)
    except KeyboardInterrupt:  # SIGTERM too, as Stopped
        print("stopped; the judges are deleted", file=sys.stderr)
        sys.exit(130)


def serve_until_stopped(config: ServeRecipe) -> None:
    """Deploy, then watch the apps and print every change of their status. Raises: DeployError, also when one is deleted."""
    print(f"starting {', '.join(config.judge_names)}", flush=True)
    try:
        deployed = deploy.deploy(config.judges, config.serve, config.judge_names, config.name)
        for name, url in deploy.addresses(config.judges, config.judge_names, deployed).items():
            print(f"{name:<12} {url}   (API: {url}/docs)", flush=True)
        print("ready; Ctrl-C ends them", flush=True)
        states = dict.fromkeys(deployed.apps.values(), "RUNNING")
        while True:
            time.sleep(POLL_S)
            running = serve.status().applications
            for app, known in states.items():
                if app not in running:
                    raise deploy.DeployError(f"deleted from outside: {app}")
                if running[app].status.value != known:
                    states[app] = running[app].status.value
                    print(f"{app} is {states[app]}: {running[app].message or 'see `serve status`'}", flush=True)
    finally:
        deploy.undeploy(config.name, config.judge_names)


if __name__ == "__main__":
    run_main(main)
