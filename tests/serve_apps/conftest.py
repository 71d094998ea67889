"""One set of judges for every test here: tiny checkpoints through the real apps, on the session's cluster."""

import httpx
import numpy as np
import pytest
import torch

from jobs.recipes import OnlineDPORecipe
from rlhf.rewards import tiny
from rlhf.rewards.ctr import build as ctr_build
from rlhf.rewards.ctr import model as ctr
from rlhf.rewards.ctr.model import Product
from serve_apps import deploy
from tests.conftest import SERVE_PORT as PORT
from tests.rlhf.rewards.openai_server import completion, openai_server

TOKEN = "a-test-token"
ITEM = {"food_name": "红烧肉", "food_type": "中式快餐", "city_name": "上海", "shop_name": "老王饭店"}
ROUNDING = 3 * 8 * 8 * torch.finfo(torch.float32).eps
"""How far a score of these tiny models may move with its place in a batch, which arrival decides, and with a replica's
threads: eps × the terms of the longest sum × size. HPSv2's goes over a patch's 3·8·8 pixels and gives a cosine; the CTR
model's has 9·64 terms, under a sigmoid whose slope is at most a quarter."""


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with hps.pt, ctr/ and qwen/."""
    folder = tmp_path_factory.mktemp("judges")
    tiny.write_hpsv2(folder / "hps.pt")
    tiny.write_qwen3_vl(folder / "qwen")
    tokenizer = ctr_build.small_tokenizer([ctr.describe(Product.of(ITEM))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ctr.save(folder / "ctr", ctr.CTRModel(ctr_build.small_config(tokenizer)), tokenizer)
    return folder


def config(
    models, *, reward="hps_ctr", hps=None, ctr=None, filter=None, deploy_timeout_s=240, **serve_section
) -> OnlineDPORecipe:
    """A run's config that deploys these judges; `filter=None` switches the filter off."""
    return OnlineDPORecipe.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"path": "unused", "item_metadata": "unused"},
            "reward": {"type": reward},
            "serve": {"port": PORT, "token": TOKEN} | serve_section,
            "judges": {
                "deploy_timeout_s": deploy_timeout_s,
                "hps": {"path": str(models / "hps.pt"), "num_cpus": 0.1, "pad_batches": True} | (hps or {}),
                "ctr": {"path": str(models / "ctr"), "num_cpus": 0.1, "pad_batches": True} | (ctr or {}),
                "filter": {"num_cpus": 0.1} | filter if filter else {"enabled": False},
            },
        }
    )


def up(config: OnlineDPORecipe, name: str) -> deploy.Deployed:
    """The judges of `config`, deployed and awaited."""
    return deploy.deploy(config.judges, config.serve, config.judge_names, name)


def down(name: str) -> None:
    deploy.undeploy(name, ("hps", "ctr", "filter"))


def scripted_verdict(body, headers):
    """The server behind the API filter: dark pictures fail, an instruction of "break" breaks it."""
    if "break" in str(body["messages"][1]):
        return 500, {"error": "out of order"}
    if len(body["messages"]) > 2:
        return 200, completion("Too dark.")
    return 200, completion("FAIL", {"PASS": -3.0, "FAIL": -0.05})


@pytest.fixture(scope="session")
def judges(cluster, models):
    """All three apps up: real HPSv2 and CTR models, the filter in API mode."""
    with openai_server(scripted_verdict) as (base, _):
        small_queue = {"max_batch_size": 4, "max_ongoing_requests": 4, "max_queued_requests": 2}
        yield up(config(models, ctr=small_queue, filter={"api_base": base}), "contract")
        down("contract")


@pytest.fixture
def client(judges):
    with httpx.Client(base_url=judges.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        yield client


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
