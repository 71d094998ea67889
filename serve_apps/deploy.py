"""Starts, adopts, awaits and deletes a run's judge apps on Ray Serve.

Serve's controller and replicas outlive the job that deployed them, so apps are named after their run
(`<run>-hpsv2`, `<run>-ctr`, `<run>-filter`, …), a start adopts an app of the same name and settings and replaces one of
other settings, and whoever deploys also undeploys. The filter is submitted first: its engine loads longest.

`start` returns at once and `wait` does the waiting, so that other set-up goes on meanwhile; `deploy` is both.
"""

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rlhf.errors import Refused
from rlhf.rewards import python
from rlhf.rewards.config import JudgeConfig, JudgesConfig, PythonJudgeConfig, ServeConfig
from rlhf.rewards.protocols import fingerprint
from rlhf.section import local_paths
from serve_apps.batcher import options
from serve_apps.ctr import CTRApp
from serve_apps.http import Secrets
from serve_apps.rewards import RewardApp
from serve_apps.vlm_filter import FilterApp

APPS: dict[str, type] = {"filter": FilterApp, "ctr": CTRApp}
"""Judges with routes of their own; every other is a `RewardApp`."""

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_DELETE_S = 60.0
_DESCRIBE_S = 20.0


class DeployError(Refused):
    """A judge app did not come up; the message says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A run's judge apps."""

    url: str
    """http://host:port of the proxy and serve.route_prefix; the apps are at `url` + route(judge)."""
    apps: dict[str, str]
    """Judge → application name, for the judges that Serve runs (not those at a `url`)."""

    def handle(self, judge: str) -> DeploymentHandle:
        """A handle on a running judge; its methods are documented in the app's module."""
        return serve.get_app_handle(self.apps[judge])


def route(judge: str) -> str:
    """/hpsv2, /ctr, /filter, …: the names that FEAST's clients ask, and the judge's own for the rest."""
    return "/hpsv2" if judge == "hps" else f"/{judge}"


def start(judges: JudgesConfig, section: ServeConfig, names: Sequence[str], run_name: str) -> Deployed:
    """Submit the apps of those judges of `names` that are ours, and return; `wait` returns once they answer.

    Raises: what `check_sources` does; DeployError where Serve already listens elsewhere, another run holds a route, or
    an orphan of this run cannot be removed.
    """
    ours = judges.to_deploy(names)
    if not ours:
        return Deployed(url="", apps={})  # every judge is elsewhere: no Serve is needed
    check_sources(judges, names)
    secrets = Secrets(token=serve_token(section), api_key=os.environ.get("QWEN_API_KEY"))
    url = _start_serve(section, judges.timeout_s)
    apps = {name: app_name(run_name, name) for name in ours}
    _check_routes({section.route_prefix + route(name): app for name, app in apps.items()})
    targets = []
    for name, judge in ours.items():
        settings = _digest(name, judge, section.route_prefix, secrets)
        if not _adopt(apps[name], settings):
            app = build(name, judge, secrets=secrets, settings=settings)
            targets.append(serve.RunTarget(app, name=apps[name], route_prefix=section.route_prefix + route(name)))
    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    return Deployed(url=url + section.route_prefix, apps=apps)


def build(name: str, judge: JudgeConfig, *, secrets: Secrets, settings: str = "") -> serve.Application:
    """The Serve application of one judge."""
    deployment = serve.deployment(**options(name, judge))(serve.ingress()(APPS.get(name, RewardApp)))
    return deployment.bind(name, judge, secrets=secrets, settings=settings)


def app(args: dict[str, Any]) -> serve.Application:
    """What `import_path` of a Serve config file names: one judge, from the keys that a recipe has below [judges].

    The token is RLHF_SERVE_TOKEN and the filter's key QWEN_API_KEY, from the application's environment.
    Raises: Refused for other than one judge or a relative path (a replica's working directory is not known here).
    """
    judges = JudgesConfig.model_validate(args)
    named = {*args, *args.get("python", {}), *args.get("http", {})}  # not what the environment alone would add
    ours = judges.to_deploy(name for name in (*judges.rewards, "filter") if name in named)
    if len(ours) != 1:
        raise Refused(f"args name {len(ours)} judges {list(ours)}; give each application exactly one")
    ((name, judge),) = ours.items()
    for key, path in local_paths(judge):
        if not os.path.isabs(path):
            raise Refused(f"{name}.{key} = {path!r} is relative; give an absolute path that every node sees")
    check_sources(judges, ours)
    secrets = Secrets(token=serve_token(ServeConfig()), api_key=os.environ.get("QWEN_API_KEY"))
    return build(name, judge, secrets=secrets)


def wait(deployed: Deployed, timeout_s: float) -> None:
    """Return once every app is RUNNING (each replica has answered a real request).

    Raises: DeployError with Serve's own message where one fails, or is not ready within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        applications = serve.status().applications
        pending = {}
        for name in deployed.apps.values():
            if name not in applications:
                raise DeployError(f"the Serve app {name} is gone: was it deleted while it started?")
            overview = applications[name]
            messages = [overview.message, *(status.message for status in overview.deployments.values())]
            detail = "\n".join(dict.fromkeys(message for message in messages if message))
            if overview.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise DeployError(f"the Serve app {name} is {overview.status.value}: {detail}")
            if overview.status != ApplicationStatus.RUNNING:
                pending[name] = f"{overview.status.value}: {detail}"
        if not pending:
            return
        if time.monotonic() > deadline:
            states = "; ".join(f"{name} {state}" for name, state in pending.items())
            raise DeployError(
                f"judges not ready after {timeout_s:g} s (judges.deploy_timeout_s): {states}. Free resources: "
                f"{_free()}. Details are in `serve status` and the replica's log."
            )
        time.sleep(_POLL_S)


def deploy(judges: JudgesConfig, section: ServeConfig, names: Sequence[str], run_name: str) -> Deployed:
    """`start`, then `wait` for `judges.deploy_timeout_s`; on failure nothing of the run stays deployed."""
    try:
        deployed = start(judges, section, names, run_name)
        wait(deployed, judges.deploy_timeout_s)
    except BaseException:
        undeploy(run_name, names)
        raise
    return deployed


def undeploy(run_name: str, names: Iterable[str]) -> None:
    """Delete the run's apps without waiting: Serve goes on deleting after the caller is gone. Absent apps are fine."""
    if not ray.is_initialized():
        return
    running = serve.status().applications
    for name in names:
        if app_name(run_name, name) in running:
            serve.delete(app_name(run_name, name), _blocking=False)


def addresses(judges: JudgesConfig, names: Iterable[str], deployed: Deployed) -> dict[str, str]:
    """Judge → the URL that clients use for it, of this cluster or external."""
    return {
        name: f"{deployed.url}{route(name)}" if name in deployed.apps else str(judges[name].external) for name in names
    }


def app_name(run_name: str, judge: str) -> str:
    """`<run>-hpsv2`, `<run>-ctr`, `<run>-filter`, …"""
    return f"{run_name}-{route(judge).strip('/')}"


def serve_token(section: ServeConfig) -> str | None:
    """The bearer token of the HTTP routes: serve.token, else RLHF_SERVE_TOKEN, else none."""
    return section.token or os.environ.get("RLHF_SERVE_TOKEN") or None


def check_sources(judges: JudgesConfig, names: Iterable[str]) -> None:
    """Raise Refused for a checkpoint that is not there, and for a function that cannot be imported."""
    for name, judge in judges.to_deploy(names).items():
        if isinstance(judge, PythonJudgeConfig):
            python.resolve(f"{judges.key(name)}.function = {judge.function!r}", str(judge.function))
            continue
        for key, path in local_paths(judge):
            if not Path(path).exists():
                raise Refused(f"{judges.key(name)}.{key} = {path!r} does not exist")


def _digest(name: str, judge: JudgeConfig, route_prefix: str, secrets: Secrets) -> str:
    """What an app is adopted by: the judge's config, the secrets, and the weights or the code behind it."""
    weights = [fingerprint(Path(path)) for _, path in local_paths(judge)]
    if isinstance(judge, PythonJudgeConfig):
        weights.append(python.version(python.resolve(name, str(judge.function)), str(judge.function)))
    tokens = [secrets.token, secrets.api_key, getattr(judge, "token", None)]  # which no dump of a config holds
    parts = [name, judge.model_dump(mode="json"), *tokens, route_prefix, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _start_serve(section: ServeConfig, timeout_s: float) -> str:
    """Start Serve, or find it running, with the configured address; returns the proxy's URL."""
    host, port = section.host, section.port
    _check_port(section)
    options = HTTPOptions(host=host, port=port, request_timeout_s=timeout_s)
    serve.start(proxy_location="HeadOnly", http_options=options)
    actual = _get_global_client().http_config
    if (actual.host, actual.port) != (host, port):
        raise DeployError(
            f"Serve already listens on {actual.host}:{actual.port} on this cluster, but serve.host = {host!r} and "
            f"serve.port = {port}; set these to the running ones, or end that Serve with `serve shutdown`"
        )
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _check_port(section: ServeConfig) -> None:
    """Raise DeployError where another program listens already, a Serve of another cluster for one.

    Two proxies can share a port, and requests then go to either. Only the head node, where the proxy runs, can be checked.
    """
    here = ray.get_runtime_context().get_node_id()
    head = any(n["NodeID"] == here and "node:__internal_head__" in n["Resources"] for n in ray.nodes())
    if not head or _get_global_client(raise_if_no_controller_running=False) is not None:
        return
    host = "127.0.0.1" if section.host == "0.0.0.0" else section.host
    with socket.socket() as probe:
        probe.settimeout(2.0)
        if probe.connect_ex((host, section.port)) == 0:
            raise DeployError(f"something listens on {host}:{section.port} already; choose another serve.port")


def check_free(names: Iterable[str], run_name: str) -> None:
    """Raise DeployError where apps of this name are up: a service has no folder, and so no lock against a second one."""
    up = [app_name(run_name, name) for name in names if app_name(run_name, name) in serve.status().applications]
    if up:
        raise DeployError(
            f"{', '.join(up)} already up on this cluster; give this service another name, or end the other one "
            f"(after a crash: serve.delete({up[0]!r}))"
        )


def _check_routes(ours: dict[str, str]) -> None:
    """ours: route → app. Raises DeployError where another app holds one of the routes."""
    for name, details in _get_global_client().get_serve_details()["applications"].items():
        taken = details["route_prefix"]
        if taken in ours and name != ours[taken] and details["status"] != ApplicationStatus.DELETING.value:
            raise DeployError(
                f"the Serve app {name} of another run holds the route {taken}: give this run its own "
                f"serve.route_prefix, or delete that app with serve.delete({name!r})"
            )


def _adopt(name: str, settings: str) -> bool:
    """True if an app of this name already runs with these settings; an app with others is deleted first."""
    overview = serve.status().applications.get(name)
    if overview is None:
        return False
    if overview.status == ApplicationStatus.RUNNING:
        try:
            if serve.get_app_handle(name).settings.remote().result(timeout_s=_DESCRIBE_S) == settings:
                return True
        except Exception as error:  # a foreign, dead or hung app is replaced whatever its fault is
            _log.warning("the settings of the Serve app %s cannot be read (%s); it is replaced", name, error)
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + _DELETE_S
    while name in serve.status().applications:
        if time.monotonic() > deadline:
            raise DeployError(f"the old Serve app {name} is not gone {_DELETE_S:g} s after its deletion")
        time.sleep(_POLL_S)
    return False


def _free() -> str:
    free = ray.available_resources()
    return ", ".join(f"{name} {free.get(name, 0):g}" for name in ("CPU", "GPU"))
