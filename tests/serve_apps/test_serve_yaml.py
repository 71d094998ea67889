"""serve_apps/serve.yaml is what `serve deploy` takes: it parses, its judges validate, and a copy of it runs."""

import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from rlhf.data.media import encode_base64
from rlhf.errors import Refused
from rlhf.rewards.config import JudgesConfig
from serve_apps import deploy
from tests.rlhf.rewards.asking import hps_reward, score
from tests.rlhf.rewards.openai_server import openai_server
from tests.serve_apps.conftest import ITEM, ROUNDING, TOKEN, scripted_verdict

FILE = Path(deploy.__file__).with_name("serve.yaml")


@pytest.fixture
def document():
    return yaml.safe_load(FILE.read_text())


def test_the_file_is_a_serve_config_of_three_valid_judges(document):
    schema = ServeDeploySchema.model_validate(document)
    assert schema.http_options.host == "127.0.0.1"
    judges = {}
    for application in schema.applications:
        assert application.import_path == "serve_apps.deploy:app"
        config = JudgesConfig.model_validate(application.args)
        ((name, judge),) = config.to_deploy([*config.rewards, "filter"]).items()
        assert application.route_prefix == deploy.route(name)
        judges[name] = judge
    assert set(judges) == {"hps", "ctr", "filter"}
    assert sum(judge.num_gpus * judge.replicas for judge in judges.values()) <= 1, "written for one card"


def test_app_takes_exactly_one_judge_by_absolute_path(models):
    hps, ctr = {"path": str(models / "hps.pt")}, {"path": str(models / "ctr")}
    assert isinstance(deploy.app({"hps": hps}), serve.Application)
    for args, error, message in [
        ({"hps": hps, "ctr": ctr}, Refused, r"2 judges \['hps', 'ctr'\]"),
        ({}, Refused, "0 judges"),
        ({"hps": {"path": "hps.pt"}}, Refused, r"hps.path = 'hps.pt' is relative"),
        ({"hps": {"path": "/no/such.pt"}}, Refused, r"judges\.hps\.path = '/no/such\.pt'"),
        ({"hps": hps | {"max_batchsize": 8}}, ValueError, "did you mean 'max_batch_size'"),
        ({"python": {"mine": {"function": "no_such_module:score"}}}, Refused, r"judges\.python\.mine\.function"),
    ]:
        with pytest.raises(error, match=message):
            deploy.app(args)


def statuses():
    return {name: app.status for name, app in serve.status().applications.items()}


def until(reached, seconds=240):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.5)


@pytest.mark.slow
def test_a_copy_on_tiny_models_is_deployed_answers_and_goes(judges, models, document):
    others = statuses()
    tiny = {"hps": {"path": str(models / "hps.pt")}, "ctr": {"path": str(models / "ctr")}}
    with openai_server(scripted_verdict) as (base, _):
        tiny["filter"] = {"path": None, "api_base": base, "gpu_memory_utilization": 0.3}
        for application in document["applications"]:
            ((name, judge),) = application["args"].items()
            judge |= {"num_cpus": 0.1, "num_gpus": 0, "pad_batches": True} | tiny[name]
            application["name"] = f"yaml-{name}"
            application["route_prefix"] = f"/yaml{application['route_prefix']}"
            application["runtime_env"] = {"env_vars": {"RLHF_SERVE_TOKEN": TOKEN}}
        names = {application["name"] for application in document["applications"]}
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(document))
        try:
            until(lambda: all(statuses()[name] == ApplicationStatus.RUNNING for name in names))
            ask(judges.url + "/yaml", models)
        finally:
            client.deploy_apps(ServeDeploySchema(applications=[]))  # what is not in the file any more goes
        until(lambda: not names & statuses().keys())
    assert statuses() == others


def ask(url, models):
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    body = {"image_base64": encode_base64(picture), "prompt": "a cat"}
    assert httpx.post(f"{url}/hpsv2/score", json=body).status_code == 401
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        expected = score(hps_reward(models / "hps.pt", batch_rows=32), [picture], ["a cat"])[0]
        same = pytest.approx(expected, rel=0, abs=ROUNDING)
        assert client.post("/hpsv2/score", json=body).json() == {"score": same}
        assert 0 < client.post("/ctr/score", json=body | {"item": ITEM}).json()["score"] < 1
        assert client.post("/filter/validate", json=body).json()["raw_response"] == "FAIL"
