"""The contract of `Reward`: one suite over every entry of REWARDS, from tiny checkpoints.

The function of the python judge is below, and so is the service that the http judge asks.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from rlhf.data.media import decode_base64_image
from rlhf.errors import Refused
from rlhf.rewards import REWARDS, load_reward, tiny
from rlhf.rewards.config import (
    AestheticJudgeConfig,
    CLIPJudgeConfig,
    CTRJudgeConfig,
    HPSJudgeConfig,
    HTTPJudgeConfig,
    PythonJudgeConfig,
)
from rlhf.rewards.ctr import model as ctr
from rlhf.rewards.ctr import small as ctr_small
from rlhf.rewards.protocols import JudgeError, Reward
from rlhf.types import Item

ITEM = Item(food_name="红烧肉", food_type="中式快餐", city_name="上海", shop_name="老王饭店")
OTHER = Item(food_name="Golden Delicious", food_type="Apple", city_name="Stockholm", shop_name="小铺")
USER_NAMES = {"python": "mine", "http": "theirs"}
SCALE = {"pickscore": 100.0}
"""Scores beyond [−1, 1]: tolerances grow with them."""


def brightness(images, prompts, items):
    """The python judge of this suite."""
    return [image.mean() / 255 + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


class Service(BaseHTTPRequestHandler):
    """`brightness` behind HTTP."""

    def do_POST(self):
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        images = [decode_base64_image(row["image_base64"]) for row in rows]
        body = json.dumps({"scores": brightness(images, [row["prompt"] for row in rows], None)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def service():
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score_batch"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def judges(tmp_path_factory, service):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = ctr_small.small_tokenizer(map(ctr.describe, (ITEM, OTHER)))
    torch.manual_seed(0)
    ctr.save(folder / "ctr", ctr.CTRModel(ctr_small.small_config(tokenizer)), tokenizer)
    clip = str(tiny.write_clip(folder / "clip"))
    head = str(tiny.write_aesthetic_head(folder / "head.pth"))
    return {
        "hps": HPSJudgeConfig(path=str(tiny.write_hpsv2(folder / "hps.pt"))),
        "ctr": CTRJudgeConfig(path=str(folder / "ctr")),
        "pickscore": CLIPJudgeConfig(path=clip),
        "clip": CLIPJudgeConfig(path=clip),
        "aesthetic": AestheticJudgeConfig(path=clip, head=head),
        "python": PythonJudgeConfig(function=f"{__name__}:brightness"),
        "http": HTTPJudgeConfig(url=service),
    }


@pytest.fixture(scope="module", params=REWARDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def name(kind):
    return USER_NAMES.get(kind, kind)


@pytest.fixture(scope="module")
def judge(judges, kind):
    return judges[kind]


@pytest.fixture(scope="module")
def reward(name, judge):
    return load_reward(name, judge, "cpu")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    shapes = ((96, 64, 3), (50, 120, 3), (64, 64, 3), (131, 78, 3), (1, 1, 3))
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def batch(pictures):
    """Pictures, prompts and items of a call: different ones, some twice."""
    prompts = ["a red apple", "一只猫", "", "a red apple", "an instruction longer than the text model reads " * 9]
    return pictures, prompts, [ITEM, OTHER, ITEM, OTHER, ITEM]


def close(name, scores):
    return pytest.approx(scores, rel=0, abs=1e-6 * SCALE.get(name, 1.0))


def alone(reward, batch):
    return [reward.score([image], [prompt], [item])[0] for image, prompt, item in zip(*batch, strict=True)]


def test_every_judge_is_tested(judges):
    assert judges.keys() == REWARDS.keys()


def test_it_is_a_reward(reward, name):
    assert isinstance(reward, Reward)
    assert reward.name == name and reward.device == ("remote" if name == "theirs" else "cpu")
    model, _, fingerprint = reward.version.rpartition("@")
    assert model and fingerprint


def test_one_score_per_picture_in_order(reward, name, batch):
    scores = reward.score(*batch)
    assert len(scores) == 5 and all(type(score) is float for score in scores)
    order = [3, 0, 4, 2, 1]
    shuffled = reward.score(*([values[index] for index in order] for values in batch))
    assert shuffled == close(name, [scores[index] for index in order])
    assert len({round(score, 4) for score in scores}) == 5


def test_equal_questions_give_equal_bits(reward, judge, name, batch):
    first = reward.score(*batch)
    assert reward.score(*batch) == first
    assert load_reward(name, judge, "cpu").score(*batch) == first


def test_a_batch_scores_as_its_pictures_alone(reward, name, batch):
    assert reward.score(*batch) == close(name, alone(reward, batch))


def test_padded_batches_give_the_same_bits(name, judge, reward, batch):
    if not hasattr(judge, "pad_batches"):
        pytest.skip(f"{type(judge).__name__} has no pad_batches")
    padded = load_reward(name, judge.model_copy(update={"pad_batches": True, "max_batch_size": 3}), "cpu")
    together = padded.score(*(list(values) * 2 for values in batch))  # 3 + 3 + 3 + 1
    assert together == alone(padded, batch) * 2
    assert together[:5] == close(name, reward.score(*batch))


def test_an_empty_list_gives_no_scores(reward):
    assert reward.score([], [], []) == []


def test_counts_must_agree(reward, batch):
    pictures, prompts, items = batch
    for wrong in ((pictures[1:], prompts, items), (pictures, prompts[1:], items), (pictures, prompts, items[1:])):
        with pytest.raises(ValueError, match="counts must agree"):
            reward.score(*wrong)


def test_arrays_must_be_pictures(reward, pictures):
    for wrong in (pictures[0].astype(np.float32), pictures[0][:, :, 0], pictures[0].transpose(2, 0, 1), [[0, 0, 0]]):
        with pytest.raises(ValueError, match="uint8"):
            reward.score([pictures[1], wrong], ["x", "x"], [ITEM, ITEM])


def test_read_only_and_strided_arrays_are_read_and_left_alone(reward, pictures):
    frozen = pictures[0].copy()
    frozen.flags.writeable = False
    strided = np.repeat(pictures[0], 2, axis=1)[:, ::2]
    scores = [reward.score([image], ["x"], [ITEM]) for image in (pictures[0].copy(), frozen, strided)]
    assert scores[0] == scores[1] == scores[2]
    assert np.array_equal(frozen, pictures[0])


def test_the_picture_changes_the_score(reward, pictures):
    changed = pictures[0].copy()
    changed[30:60, 20:50] = 255 - changed[30:60, 20:50] // 4
    a, b = reward.score([pictures[0], changed], ["x", "x"], [ITEM, ITEM])
    assert abs(a - b) > 1e-5


def test_the_prompt_changes_the_score_if_it_is_read(reward, judge, pictures):
    a, b = reward.score([pictures[0]] * 2, ["a cat", "a green apple"], [ITEM] * 2)
    assert (abs(a - b) > 1e-5) == judge.reads_prompt


def test_the_item_is_asked_for_if_it_is_needed(reward, judge, pictures):
    if not judge.needs_item:
        a, b, c = reward.score([pictures[0]] * 3, ["x"] * 3, [ITEM, OTHER, None])
        assert a == b == c
        return
    a, b = reward.score([pictures[0]] * 2, ["x"] * 2, [ITEM, OTHER])
    assert abs(a - b) > 1e-5
    with pytest.raises(Refused, match="needs an item"):
        reward.score([pictures[0]] * 2, ["x"] * 2, [ITEM, None])


def test_a_missing_source_is_named(kind, name, judge, pictures):
    def load(value):
        return load_reward(name, judge.model_copy(update={judge.source: value}), "cpu")

    if kind == "http":  # reached only when it is asked
        with pytest.raises(JudgeError, match=r"http://127\.0\.0\.1:1/gone"):
            load("http://127.0.0.1:1/gone").score(pictures[:1], ["x"], [None])
        return
    key = "judges.python.mine.function" if kind == "python" else f"judges.{kind}.path"
    gone = "no.such:function" if kind == "python" else "/no/such"
    for value, message in ((gone, f"{key} = '{gone}'"), (None, f"{key} is not set")):
        with pytest.raises(Refused, match="is no CTR checkpoint" if kind == "ctr" else message):
            load(value)
