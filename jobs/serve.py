"""Judges as a service, without a run: `python -m jobs.serve --config jobs/configs/serve.toml`, until Ctrl-C.

Deploys every judge of the recipe that has a source, waits until each has answered a real request, and prints their
addresses. When it ends, they are deleted. `serve deploy serve_apps/serve.yaml` is the same without a process that stays.
"""

import time

from ray import serve

from actors import placement
from jobs.cli import parse, resolved_toml, run_main, say
from jobs.launch import cluster, free_resources
from jobs.recipes import ServeRecipe
from serve_apps import deploy

POLL_S = 5.0


def main() -> None:
    config, is_dry = parse(ServeRecipe, description=__doc__ or "")
    deploy.check_sources(config.judges, config.serve, config.judge_names)
    needed = placement.judge_roles(config.judges, config.judge_names)
    if is_dry:
        say(resolved_toml(config))
        say(placement.table(needed, free_resources(config.cluster)))
        placement.check(needed, free_resources(config.cluster))
        return
    with cluster(config.cluster, config.name):
        deploy.check_free(config.judge_names, config.name)
        placement.check(needed, free_resources(config.cluster))
        say(f"starting {', '.join(config.judge_names)}")
        try:
            watch(config, deploy.deploy(config.judges, config.serve, config.judge_names, config.name))
        finally:
            deploy.undeploy(config.name, config.judge_names)


def watch(config: ServeRecipe, deployed: deploy.Deployed) -> None:
    """Print where the judges are, and every change of their status. Raises DeployError when one is deleted."""
    for name, url in deploy.addresses(config.judges, config.judge_names, deployed).items():
        say(f"{name:<12} {url}   (API: {url}/docs)")
    say("ready; Ctrl-C ends them")
    states = dict.fromkeys(deployed.apps.values(), "RUNNING")
    while True:
        time.sleep(POLL_S)
        running = serve.status().applications
        for app, known in states.items():
            if app not in running:
                raise deploy.DeployError(f"deleted from outside: {app}")
            if running[app].status.value != known:
                states[app] = running[app].status.value
                say(f"{app} is {states[app]}: {running[app].message or 'see `serve status`'}")


if __name__ == "__main__":
    run_main(main, "the judges are deleted")
