"""Life of a run's apps: adopted, replaced, refused, and gone after a failure."""

import time

import pytest
from ray import serve

from rlhf.errors import Refused
from rlhf.rewards.config import JudgesConfig, ServeConfig
from serve_apps import deploy
from serve_apps.deploy import DeployError, app_name, check_sources
from tests.serve_apps.conftest import PORT, config, down, up


def test_only_needed_judges_are_deployed_the_filter_first(models):
    def deployed(**changes):
        run = config(models, **changes)
        return list(run.judges.to_deploy(run.judge_names))

    assert deployed(filter={"path": "x"}) == ["filter", "hps", "ctr"]
    assert deployed(reward="hps") == ["hps"]
    assert deployed(hps={"url": "http://x"}) == ["ctr"]


def test_applications_are_named_in_ascii_and_never_alike():
    assert app_name("demo-v0-1a2b3c", "hps") == "demo-v0-1a2b3c-hpsv2"
    names = {app_name(run, "hps") for run in ("产品", "产物", "a b", "a_b", "x" * 200, "x" * 201)}
    assert len(names) == 6 and all(name.isascii() and len(name) < 100 and " " not in name for name in names)


def test_a_missing_checkpoint_is_found_before_anything_starts(models):
    with pytest.raises(Refused, match=r"judges\.hps\.path"):
        up(config(models, hps={"path": "/no/such/file.pt"}), "missing")


@pytest.mark.parametrize(
    "url",
    [
        *("judges:8000/hpsv2", "http://", "http://host:port/hpsv2", "/hpsv2", "http://h:99999/x", "http://h:0/x"),
        *("http://h x/y", "http://h/y#z", "http://a..b/x", f"http://{'a' * 70}/x"),
    ],
)
def test_a_url_that_is_none_is_found_before_anything_starts(url):
    with pytest.raises(Refused, match=r"judges\.hps\.url = .* is no address"):
        check_sources(JudgesConfig(hps={"url": url}), ServeConfig(), ["hps"])
    check_sources(JudgesConfig(hps={"url": "https://host:8000/hpsv2"}), ServeConfig(), ["hps"])


def test_an_address_of_the_environment_is_checked_like_a_recipes(monkeypatch):
    monkeypatch.setenv("QWEN_API_BASE", "nonsense")
    with pytest.raises(Refused, match=r"judges\.filter\.api_base \(also QWEN_API_BASE\) = 'nonsense' is no address"):
        check_sources(JudgesConfig(), ServeConfig(), ["filter"])


def test_a_host_that_is_none_is_found_before_anything_starts():
    judges = JudgesConfig.model_validate({"python": {"one": {"function": "tests.jobs.light:greenness"}}})
    check_sources(judges, ServeConfig(host="0.0.0.0"), ["one"])
    with pytest.raises(Refused, match=r"serve\.host = 'nope\.invalid' is no address: .*give 127\.0\.0\.1"):
        check_sources(judges, ServeConfig(host="nope.invalid"), ["one"])


def test_a_proxy_that_cannot_be_used_is_found_before_anything_starts(monkeypatch):
    """For every judge that is asked elsewhere, by whomever; a service on this machine needs no proxy."""
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    def check(name, table, url):
        key = "api_base" if name == "filter" else "url"
        judges = JudgesConfig.model_validate({table: {name: {key: url}}} if table else {name: {key: url}})
        check_sources(judges, ServeConfig(), [name])

    for name, table in (("hps", None), ("filter", None), ("freshness", "http")):
        with pytest.raises(Refused, match=r"http://judge\.invalid/v1 cannot be asked through the proxy ALL_PROXY = "):
            check(name, table, "http://judge.invalid/v1")
        check(name, table, "http://127.0.0.1:8000/v1")


def test_a_taken_route_and_another_port_are_refused(judges, models):
    with pytest.raises(DeployError, match="contract-hpsv2 of another run holds the route /hpsv2"):
        up(config(models, reward="hps"), "second")
    with pytest.raises(DeployError, match=rf"already listens on 127\.0\.0\.1:{PORT}"):
        up(config(models, reward="hps", port=PORT + 1), "second")
    assert not any(name.startswith("second") for name in serve.status().applications)
    assert "contract-hpsv2" in serve.status().applications


@pytest.mark.slow
def test_equal_settings_are_adopted_and_others_replaced(cluster, models):
    def started():
        return serve.status().applications[app_name("adopt", "hps")].last_deployed_time_s

    place = {"reward": "hps", "route_prefix": "/adopt"}
    try:
        assert up(config(models, **place), "adopt").url.endswith("/adopt")
        first = started()
        up(config(models, **place), "adopt")
        assert started() == first
        up(config(models, hps={"max_batch_size": 2}, **place), "adopt")
        assert started() > first
    finally:
        down("adopt")
    deadline = time.monotonic() + 30
    while app_name("adopt", "hps") in serve.status().applications:
        assert time.monotonic() < deadline


@pytest.mark.slow
def test_a_judge_that_does_not_start_says_so_and_leaves_nothing(cluster, models, tmp_path, monkeypatch):
    """A module that the driver finds, and so nobody refuses before, but a replica does not."""
    (tmp_path / "only_here.py").write_text("def score(images, prompts, items):\n    return [0.0] * len(images)\n")
    monkeypatch.syspath_prepend(tmp_path)
    judges = JudgesConfig.model_validate(
        {"deploy_timeout_s": 60, "python": {"lost": {"function": "only_here:score", "num_cpus": 0.1}}}
    )
    section = config(models, reward="hps", route_prefix="/broken").serve
    with pytest.raises(DeployError, match="broken-lost"):
        deploy.deploy(judges, section, ["lost"], "broken")
    assert serve.status().applications.get("broken-lost") is None or "DELETING" in str(serve.status())


def test_a_judge_that_gets_no_cpu_is_refused_in_time(cluster, models):
    greedy = config(models, reward="hps", hps={"num_cpus": 100}, deploy_timeout_s=3, route_prefix="/greedy")
    with pytest.raises(DeployError, match=r"not ready after 3 s.*Free resources: CPU"):
        up(greedy, "greedy")
    assert serve.status().applications.get("greedy-hpsv2") is None or "DELETING" in str(serve.status())
