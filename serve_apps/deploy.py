"""Starts, adopts, awaits and deletes a run's judge apps on Ray Serve.

Serve's controller and replicas outlive the job that deployed them, so apps are named after their run
(`<run>-hpsv2`, `<run>-ctr`, `<run>-filter`), a start adopts an app of the same name and settings and replaces one of
other settings, and whoever deploys also undeploys. The filter is submitted first: its engine loads longest.

`start` returns at once and `wait` does the waiting, so that other set-up goes on meanwhile; `deploy` is both.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rlhf.config import OnlineDPOConfig
from rlhf.rewards.api_filter import from_environment
from rlhf.rewards.config import FilterJudgeConfig, HPSJudgeConfig, JudgeConfig
from rlhf.rewards.reward import fingerprint
from serve_apps.ctr import build_ctr
from serve_apps.hpsv2 import build_hpsv2
from serve_apps.vlm_filter import build_filter

ROUTES = {"filter": "/filter", "hps": "/hpsv2", "ctr": "/ctr"}
"""Judge → route prefix, in the order in which they start."""

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_DELETE_S = 60.0
_DESCRIBE_S = 20.0


class DeployError(RuntimeError):
    """A judge app did not come up; the message says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A run's judge apps."""

    url: str
    """http://host:port of the proxy and serve.route_prefix; the apps are at `url` + ROUTES[judge]."""
    apps: dict[str, str]
    """Judge ("hps", "ctr", "filter") → application name, for the judges that Serve runs (not those at a `url`)."""

    def handle(self, judge: str) -> DeploymentHandle:
        """A handle on a running judge; its methods are documented in the app's module."""
        return serve.get_app_handle(self.apps[judge])


def judges_to_deploy(config: OnlineDPOConfig) -> dict[str, JudgeConfig]:
    """The judges this run needs that are not at an external `url`, in starting order."""
    wanted = [*(["filter"] if config.judges.filter.enabled else []), *config.reward.names]
    judges = {name: getattr(config.judges, name) for name in ROUTES if name in wanted}
    if "filter" in judges:
        judges["filter"] = from_environment(judges["filter"])
    return {name: judge for name, judge in judges.items() if judge.url is None}


def start(config: OnlineDPOConfig, run_name: str) -> Deployed:
    """Submit the judge apps and return; `wait` tells when they answer.

    Raises: FileNotFoundError for a missing checkpoint, DeployError where Serve already listens elsewhere, another run
    holds a route, or an orphan of this run cannot be removed.
    """
    judges = judges_to_deploy(config)
    if not judges:
        return Deployed(url="", apps={})  # every judge is elsewhere: no Serve is needed
    check_paths(config)
    url = _start_serve(config)
    apps = {name: app_name(run_name, name) for name in judges}
    routes = {name: config.serve.route_prefix + ROUTES[name] for name in judges}
    _check_routes(apps, routes)
    targets = []
    for name, judge in judges.items():
        settings = _digest(config, name, judge)
        if _adopt(apps[name], settings):
            continue
        app = _build(judge, serve_token(config), settings)
        targets.append(serve.RunTarget(target=app, name=apps[name], route_prefix=routes[name]))
    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    return Deployed(url=url + config.serve.route_prefix, apps=apps)


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
                raise DeployError(f"the Serve app {name} has vanished: was it deleted while it started?")
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
                f"{_free()}. `serve status` and the replica's log tell more."
            )
        time.sleep(_POLL_S)


def deploy(config: OnlineDPOConfig, run_name: str) -> Deployed:
    """`start`, then `wait` for `judges.deploy_timeout_s`; on failure nothing of the run stays deployed."""
    try:
        deployed = start(config, run_name)
        wait(deployed, config.judges.deploy_timeout_s)
    except BaseException:
        undeploy(run_name)
        raise
    return deployed


def undeploy(run_name: str, judges: Iterable[str] = tuple(ROUTES)) -> None:
    """Delete the run's apps without waiting: Serve goes on deleting after the caller is gone. Absent apps are fine."""
    if not ray.is_initialized():
        return
    running = serve.status().applications
    for judge in judges:
        if app_name(run_name, judge) in running:
            serve.delete(app_name(run_name, judge), _blocking=False)


def addresses(config: OnlineDPOConfig, deployed: Deployed) -> dict[str, str]:
    """Judge → the URL that clients use for it, of this cluster or external."""
    external = {name: getattr(config.judges, name).url for name in ROUTES if name not in deployed.apps}
    here = {name: f"{deployed.url}{ROUTES[name]}" for name in deployed.apps}
    return here | {name: url for name, url in external.items() if url}


def app_name(run_name: str, judge: str) -> str:
    """`<run>-hpsv2`, `<run>-ctr`, `<run>-filter`."""
    return f"{run_name}-{ROUTES[judge].strip('/')}"


def serve_token(config: OnlineDPOConfig) -> str | None:
    """The bearer token of the HTTP routes: serve.token, else RLHF_SERVE_TOKEN, else none."""
    return config.serve.token or os.environ.get("RLHF_SERVE_TOKEN") or None


def _build(judge: JudgeConfig, token: str | None, settings: str) -> serve.Application:
    if isinstance(judge, FilterJudgeConfig):
        return build_filter(judge, api_key=os.environ.get("QWEN_API_KEY"), token=token, settings=settings)
    if isinstance(judge, HPSJudgeConfig):
        return build_hpsv2(judge, token=token, settings=settings)
    return build_ctr(judge, token=token, settings=settings)


def check_paths(config: OnlineDPOConfig) -> None:
    """Raise FileNotFoundError for a judge whose checkpoint is not there."""
    for name, judge in judges_to_deploy(config).items():
        if judge.path is not None and not Path(judge.path).exists():
            raise FileNotFoundError(f"judges.{name}.path = {judge.path!r} does not exist")


def _digest(config: OnlineDPOConfig, name: str, judge: JudgeConfig) -> str:
    """What an app is adopted by: the judge's config, the token and the weights behind `path`."""
    weights = fingerprint(Path(judge.path)) if judge.path else ""
    parts = [name, judge.model_dump(mode="json"), serve_token(config), config.serve.route_prefix, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _start_serve(config: OnlineDPOConfig) -> str:
    """Start Serve, or find it running, with the configured address; returns the proxy's URL."""
    host, port = config.serve.host, config.serve.port
    options = HTTPOptions(host=host, port=port, request_timeout_s=config.judges.timeout_s)
    serve.start(proxy_location="HeadOnly", http_options=options)
    actual = _get_global_client().http_config
    if (actual.host, actual.port) != (host, port):
        raise DeployError(
            f"Serve already listens on {actual.host}:{actual.port} on this cluster, but serve.host = {host!r} and "
            f"serve.port = {port}; set these to the running ones, or end that Serve with `serve shutdown`"
        )
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _check_routes(apps: dict[str, str], routes: dict[str, str]) -> None:
    ours = {routes[judge]: apps[judge] for judge in apps}
    for name, details in _get_global_client().get_serve_details()["applications"].items():
        route = details["route_prefix"]
        if route in ours and name != ours[route] and details["status"] != ApplicationStatus.DELETING.value:
            raise DeployError(
                f"the Serve app {name} of another run holds the route {route}: give this run its own "
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
        except Exception as error:  # a foreign, dead or hung app is replaced whatever ails it
            _log.warning("the Serve app %s does not tell its settings (%s); it is replaced", name, error)
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
