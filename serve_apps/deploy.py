"""Starts, adopts, awaits and deletes a run's judge apps on Ray Serve.

Serve's controller and replicas outlive the job that deployed them, so apps are named after their run
(`<run>-hpsv2`, `<run>-ctr`, `<run>-filter`, …), a start adopts an app of the same name and settings and replaces one of
other settings, and whoever deploys also undeploys. The filter is submitted first: its engine loads longest.
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
from ray.serve.schema import ApplicationStatus

from rlhf.errors import Refused
from rlhf.names import plain
from rlhf.rewards import check_judge, python
from rlhf.rewards.config import JudgeConfig, JudgesConfig, PythonJudgeConfig, ServeConfig, check_address
from rlhf.rewards.connections import proxy_of
from rlhf.rewards.protocols import quick_fingerprint
from rlhf.section import local_paths
from serve_apps.batcher import options
from serve_apps.ctr import CTRApp
from serve_apps.http import Secrets
from serve_apps.rewards import RewardApp
from serve_apps.vlm_filter import FilterApp

_log = logging.getLogger(__name__)
# Serve's own lines on starts and deletions: jobs say it, and "New http_options … will not be applied" is said of equal ones.
logging.getLogger("ray.serve").setLevel(logging.WARNING)
_POLL_S = 0.5
_DELETE_S = 60.0


class DeployError(Refused):
    """A judge app did not come up; the message says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    url: str
    """http://host:port of the proxy and serve.route_prefix; the apps are at `url` + route(judge)."""
    apps: dict[str, str]
    """Judge → application name, for the judges that Serve runs (not those at a `url`)."""


def route(judge: str) -> str:
    """/hpsv2, /ctr, /filter, …: the names that FEAST's clients ask, and the judge's own for the rest."""
    return "/hpsv2" if judge == "hps" else f"/{judge}"


def deploy(judges: JudgesConfig, section: ServeConfig, names: Sequence[str], run_name: str) -> Deployed:
    """Start those judges of `names` that are ours, and return once each replica of each has answered a real request.

    On failure nothing of the run stays deployed. Raises: what `check_sources` does; DeployError where Serve already listens
    elsewhere, another run holds a route, an orphan of this run cannot be removed, or, with Serve's own message, an app fails
    or is not ready within `judges.deploy_timeout_s`.
    """
    try:
        deployed = _submit(judges, section, names, run_name)
        deadline = time.monotonic() + judges.deploy_timeout_s
        while pending := _pending(deployed):
            if time.monotonic() > deadline:
                free = ray.available_resources()
                raise DeployError(
                    f"judges not ready after {judges.deploy_timeout_s:g} s (judges.deploy_timeout_s): "
                    f"{'; '.join(pending)}. Free resources: CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}. Details "
                    "are in `serve status` and the replica's log."
                )
            time.sleep(_POLL_S)
    except BaseException:
        undeploy(run_name, names)
        raise
    return deployed


def _submit(judges: JudgesConfig, section: ServeConfig, names: Sequence[str], run_name: str) -> Deployed:
    ours = judges.to_deploy(names)
    if not ours:
        return Deployed(url="", apps={})  # no Serve is needed
    check_sources(judges, section, names)
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


def _pending(deployed: Deployed) -> list[str]:
    """The apps that are not RUNNING yet, with what Serve says of them. Raises DeployError where one fails."""
    applications = serve.status().applications
    pending = []
    for name in deployed.apps.values():
        if name not in applications:
            raise DeployError(f"the Serve app {name} is gone: was it deleted while it started?")
        app = applications[name]
        messages = [app.message, *(status.message for status in app.deployments.values())]
        told = f"{app.status.value}: " + "\n".join(dict.fromkeys(message for message in messages if message))
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise DeployError(f"the Serve app {name} is {told}")
        if app.status != ApplicationStatus.RUNNING:
            pending.append(f"{name} {told}")
    return pending


def build(name: str, judge: JudgeConfig, *, secrets: Secrets, settings: str = "") -> serve.Application:
    """The Serve application of one judge."""
    app: type = {"filter": FilterApp, "ctr": CTRApp}.get(name, RewardApp)
    deployment = serve.deployment(**options(name, judge))(serve.ingress()(app))
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
    check_sources(judges, ServeConfig(), [*ours])
    secrets = Secrets(token=serve_token(ServeConfig()), api_key=os.environ.get("QWEN_API_KEY"))
    return build(name, judge, secrets=secrets)


def undeploy(run_name: str, names: Iterable[str]) -> None:
    """Delete the run's apps without waiting: Serve goes on deleting after the caller is gone. Absent apps are fine."""
    for app in _up(run_name, names) if ray.is_initialized() else ():
        serve.delete(app, _blocking=False)


def check_free(names: Iterable[str], run_name: str) -> None:
    """Raise DeployError where apps of this name are up: a service has no folder, and so no lock against a second one."""
    if up := _up(run_name, names):
        raise DeployError(
            f"{', '.join(up)} already up on this cluster; give this service another name, or end the other one "
            f"(after a crash: serve.delete({up[0]!r}))"
        )


def _up(run_name: str, names: Iterable[str]) -> list[str]:
    running = serve.status().applications
    return [app for name in names if (app := app_name(run_name, name)) in running]


def addresses(judges: JudgesConfig, names: Iterable[str], deployed: Deployed) -> dict[str, str]:
    """Judge → the URL that clients use for it, of this cluster or external."""
    ours = {name: deployed.url + route(name) for name in deployed.apps}
    return {name: ours.get(name) or str(judges[name].external) for name in names}


def app_name(run_name: str, judge: str) -> str:
    """`<run>-hpsv2`, `<run>-ctr`, `<run>-filter`, …, in ASCII: Serve tags its metrics with it."""
    return f"{plain(run_name)}-{route(judge).strip('/')}"


def serve_token(section: ServeConfig) -> str | None:
    """The bearer token of the HTTP routes: serve.token, else RLHF_SERVE_TOKEN, else none."""
    return section.token or os.environ.get("RLHF_SERVE_TOKEN") or None


def check_sources(judges: JudgesConfig, section: ServeConfig, names: Sequence[str]) -> None:
    """Raise Refused for a checkpoint that is not there or not what it should be, a function that cannot be imported, a url
    that is none, where a service would be asked through a proxy that cannot be used, and for a serve.host that is none.
    """
    for name in names:
        if (url := judges[name].address) is None:
            continue
        try:
            check_address(url)
        except ValueError as error:
            of_the_api = url == getattr(judges[name], "api_base", None)
            key = "api_base (also QWEN_API_BASE)" if of_the_api else "url"
            raise Refused(f"{judges.key(name)}.{key} = {url!r} {error}") from error
        if proxy := proxy_of(url):
            proxy.check(url)
    ours = judges.to_deploy(names)
    if ours:
        _check_host(section)
    for name, judge in ours.items():
        for key, path in local_paths(judge):
            if not Path(path).exists():
                raise Refused(f"{judges.key(name)}.{key} = {path!r} does not exist")
        check_judge(judges.key(name), name, judge)


def _check_host(section: ServeConfig) -> None:
    try:
        socket.getaddrinfo(section.host, section.port)
    except (OSError, UnicodeError) as error:
        remedy = "give 127.0.0.1 for this machine alone, or 0.0.0.0 or an address of it for others"
        raise Refused(f"serve.host = {section.host!r} is no address: {error}; {remedy}") from error


def _digest(name: str, judge: JudgeConfig, route_prefix: str, secrets: Secrets) -> str:
    """What an app is adopted by: the judge's config, the secrets, and the weights or the code behind it."""
    weights = [quick_fingerprint(Path(path)) for _, path in local_paths(judge)]
    if isinstance(judge, PythonJudgeConfig):
        weights.append(python.version(python.resolve(name, str(judge.function)), str(judge.function)))
    tokens = [secrets.token, secrets.api_key, getattr(judge, "token", None)]  # which no dump of a config holds
    parts = [name, judge.model_dump(mode="json"), *tokens, route_prefix, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _start_serve(section: ServeConfig, timeout_s: float) -> str:
    """Start Serve, or find it running, with the configured address; returns the proxy's URL."""
    host, port = section.host, section.port
    local = "127.0.0.1" if host == "0.0.0.0" else host
    # Two proxies can share a port, and requests then go to either: another cluster's Serve may listen. Only the head node,
    # where the proxy runs, can be checked.
    here = ray.get_runtime_context().get_node_id()
    head = any(n["NodeID"] == here and "node:__internal_head__" in n["Resources"] for n in ray.nodes())
    if head and _get_global_client(raise_if_no_controller_running=False) is None:
        with socket.socket() as probe:
            probe.settimeout(2.0)
            if probe.connect_ex((local, port)) == 0:
                raise DeployError(f"something listens on {local}:{port} already; choose another serve.port")
    http_options = HTTPOptions(host=host, port=port, request_timeout_s=timeout_s)
    serve.start(proxy_location="HeadOnly", http_options=http_options)
    actual = _get_global_client().http_config
    if (actual.host, actual.port) != (host, port):
        raise DeployError(
            f"Serve already listens on {actual.host}:{actual.port} on this cluster, but serve.host = {host!r} and "
            f"serve.port = {port}; set these to the running ones, or end that Serve with `serve shutdown`"
        )
    return f"http://{local}:{port}"


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
    app = serve.status().applications.get(name)
    if app is None:
        return False
    if app.status == ApplicationStatus.RUNNING:
        try:
            if serve.get_app_handle(name).settings.remote().result(timeout_s=20) == settings:
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
