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
from rlhf.rewards.ctr import build as ctr_build
from rlhf.rewards.ctr import model as ctr
from rlhf.rewards.ctr.model import Product
from rlhf.rewards.protocols import JudgeError, Reward, as_media, frames_of
from tests.rlhf.rewards import tiny_clip

ITEM = {"food_name": "红烧肉", "food_type": "中式快餐", "city_name": "上海", "shop_name": "老王饭店"}
OTHER = {"food_name": "Golden Delicious", "food_type": "Apple", "city_name": "Stockholm", "shop_name": "小铺"}
USER_NAMES = {"python": "mine", "http": "theirs"}
SCALE = {"pickscore": 100.0}
"""Scores beyond [−1, 1]: tolerances grow with them."""
TERMS = {"ctr": 9 * 64, "aesthetic": 1024}
"""Of the longest sum in the model: a convolution, a layer of the head; in the CLIPs themselves the 3·8·8 values of a patch."""


def brightness(images, prompts, sources, items):
    """The python judge of this suite."""
    befores = [sum(source.mean() for source in some) / 255 for some in sources]
    return [i.mean() / 255 + len(prompt) - b for i, prompt, b in zip(images, prompts, befores, strict=True)]


class Service(BaseHTTPRequestHandler):
    """`brightness` behind HTTP."""

    def do_POST(self):
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        images = [decode_base64_image(row["image_base64"]) for row in rows]
        given = [row.get("source_base64", []) for row in rows]
        sources = [
            [decode_base64_image(text) for text in ([some] if isinstance(some, str) else some)] for some in given
        ]
        scores = brightness(images, [row["prompt"] for row in rows], sources, None)
        body = json.dumps({"scores": scores}).encode()
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
    tokenizer = ctr_build.small_tokenizer(ctr.describe(Product.of(item)) for item in (ITEM, OTHER))
    torch.manual_seed(0)
    ctr.save(folder / "ctr", ctr.CTRModel(ctr_build.small_config(tokenizer)), tokenizer)
    clip = str(tiny_clip.write_clip(folder / "clip"))
    head = str(tiny_clip.write_aesthetic_head(folder / "head.pth"))
    return {
        "hps": HPSJudgeConfig(path=str(tiny.write_hpsv2(folder / "hps.pt"))),
        "ctr": CTRJudgeConfig(path=str(folder / "ctr")),
        "pickscore": CLIPJudgeConfig(path=clip),
        "clip": CLIPJudgeConfig(path=clip),
        "aesthetic": AestheticJudgeConfig(path=clip, head=head),
        "python": PythonJudgeConfig(function=f"{__name__}:brightness"),
        "http": HTTPJudgeConfig(url=service, send_source=True),
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
def reads_sources(reward, judge):
    return getattr(reward, "reads_sources", judge.reads_sources)


@pytest.fixture(scope="module")
def batch(pictures):
    """Media, prompts, sources and items of a call: different ones, some twice, with none, one or two sources."""
    media = [picture[None] for picture in pictures]
    prompts = ["a red apple", "一只猫", "", "a red apple", "an instruction longer than the text model reads " * 9]
    sources = [(), (media[0],), (media[1], media[2]), (media[0],), ()]
    return media, prompts, sources, [ITEM, OTHER, ITEM, OTHER, ITEM]


def close(name, scores):
    """Equal up to the order in which sums are taken, which a row's place and the batch's size decide on some CPUs.

    One sum moves by less than eps × terms × size; the few layers' errors have random signs and stay below that together.
    """
    rounding = torch.finfo(torch.float32).eps * TERMS.get(name, 192) * SCALE.get(name, 1.0)
    return pytest.approx(scores, rel=0, abs=rounding)


def alone(reward, batch):
    return [reward.score(*([value] for value in question))[0] for question in zip(*batch, strict=True)]


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


def test_neighbours_change_no_bit_of_a_score_in_padded_batches(name, judge, reward, batch):
    """Neither what they show nor how many they are. The place in the batch may, and is held."""
    if not hasattr(judge, "pad_batches"):
        pytest.skip(f"{type(judge).__name__} has no pad_batches")
    padded = load_reward(name, judge.model_copy(update={"pad_batches": True, "max_batch_size": 3}), "cpu")

    def score(rows):
        return padded.score(*([values[row] for row in rows] for values in batch))

    for index in range(5):
        others = [row for row in range(5) if row != index]
        for place in range(3):
            among = score([*others[:place], index, *others[place:2]])[place]
            assert score([*others[2 : 2 + place], index])[place] == among
    assert score([*range(5)] * 2) == close(name, reward.score(*batch) * 2)  # 3 + 3 + 3 + 1


def test_an_empty_list_gives_no_scores(reward):
    assert reward.score([], [], [], []) == []


def test_counts_must_agree(reward, batch):
    for place in range(4):
        with pytest.raises(ValueError, match="counts must agree"):
            reward.score(*(values[1:] if place == index else values for index, values in enumerate(batch)))


def test_arrays_must_be_media(reward, pictures):
    good = pictures[1][None]
    for picture in (pictures[0].astype(np.float32), pictures[0][:, :, 0], pictures[0].transpose(2, 0, 1), [[0, 0, 0]]):
        wrong = picture[None] if isinstance(picture, np.ndarray) else picture
        with pytest.raises(ValueError, match="uint8"):
            reward.score([good, wrong], ["x", "x"], [(), ()], [ITEM, ITEM])
        with pytest.raises(ValueError, match="uint8"):
            reward.score([good, good], ["x", "x"], [(), (wrong,)], [ITEM, ITEM])
    with pytest.raises(ValueError, match="uint8"):
        reward.score([pictures[0]], ["x"], [()], [ITEM])  # a picture without its axis of frames


def test_more_frames_than_it_reads_are_an_error_and_no_score_of_the_first(reward, judge, pictures):
    video = np.stack([pictures[0]] * (judge.frames + 1))
    with pytest.raises(ValueError, match=f"{len(video)} frames"):
        reward.score([video], ["x"], [()], [ITEM])
    chosen = frames_of(video, judge.frames)
    assert reward.score([chosen], ["x"], [()], [ITEM]) == reward.score([pictures[0][None]], ["x"], [()], [ITEM])


def test_read_only_and_strided_arrays_are_read_and_left_alone(reward, pictures):
    frozen = pictures[0].copy()
    frozen.flags.writeable = False
    strided = np.repeat(pictures[0], 2, axis=1)[:, ::2]
    arrays = (pictures[0].copy(), frozen, strided)
    scores = [reward.score([image[None]], ["x"], [(image[None],)], [ITEM]) for image in arrays]
    assert scores[0] == scores[1] == scores[2]
    assert np.array_equal(frozen, pictures[0])


def test_the_picture_changes_the_score(reward, pictures):
    changed = pictures[0].copy()
    changed[30:60, 20:50] = 255 - changed[30:60, 20:50] // 4
    a, b = reward.score([pictures[0][None], changed[None]], ["x", "x"], [(), ()], [ITEM, ITEM])
    assert abs(a - b) > 1e-5


def test_the_prompt_changes_the_score_if_it_is_read(reward, judge, pictures):
    a, b = reward.score([pictures[0][None]] * 2, ["a cat", "a green apple"], [()] * 2, [ITEM] * 2)
    assert (abs(a - b) > 1e-5) == judge.reads_prompt


def test_the_sources_change_the_score_if_they_are_read(reward, reads_sources, pictures):
    medium, other = pictures[0][None], pictures[2][None] // 2
    a, b, c = (reward.score([medium], ["x"], [sources], [ITEM]) for sources in ((), (medium,), (medium, other)))
    if not reads_sources:
        assert a == b == c
        return
    assert abs(a[0] - b[0]) > 1e-5 and abs(b[0] - c[0]) > 1e-5


def test_the_columns_that_are_needed_are_named(reward, judge, pictures):
    medium = pictures[0][None]
    if not judge.item_columns:
        a, b, c = (reward.score([medium], ["x"], [()], [item]) for item in (ITEM, {"price": "3"}, {}))
        assert a == b == c
        return
    a, b, c = (reward.score([medium], ["x"], [()], [item]) for item in (ITEM, OTHER, ITEM | {"price": "3"}))
    assert abs(a[0] - b[0]) > 1e-5 and a == c
    for column in judge.item_columns:
        partial = {name: text for name, text in ITEM.items() if name != column}
        with pytest.raises(Refused, match=f"missing: {column} "):
            reward.score([medium] * 2, ["x"] * 2, [()] * 2, [ITEM, partial])


def test_a_missing_source_is_named(kind, name, judge, pictures):
    def load(value):
        return load_reward(name, judge.model_copy(update={judge.source: value}), "cpu")

    if kind == "http":  # reached only when it is asked
        with pytest.raises(JudgeError, match=r"http://127\.0\.0\.1:1/gone"):
            load("http://127.0.0.1:1/gone").score([pictures[0][None]], ["x"], [()], [{}])
        return
    key = "judges.python.mine.function" if kind == "python" else f"judges.{kind}.path"
    gone = "no.such:function" if kind == "python" else "/no/such"
    for value, message in ((gone, f"{key} = '{gone}'"), (None, f"{key} is not set")):
        with pytest.raises(Refused, match="is no CTR checkpoint" if kind == "ctr" else message):
            load(value)


@pytest.mark.parametrize(("length", "count", "chosen"), [(1, 1, [0]), (1, 8, [0]), (81, 1, [40]), (9, 3, [1, 4, 7])])
def test_frames_are_spread_evenly_over_a_medium(length, count, chosen):
    video = np.arange(length, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert frames_of(video, count)[:, 0, 0, 0].tolist() == chosen


def test_a_picture_is_media_of_one_frame_and_shares_its_memory(pictures):
    media = as_media(pictures[0])
    assert media.shape == (1, *pictures[0].shape) and np.shares_memory(media, pictures[0])
    assert as_media(media) is media
