"""Our HPSv2 scores against the `hpsv2` package's own code: its loader, transform, tokenizer and `score`, unchanged.

The package runs in a process of its own, from a copy with what its wheel lacks put beside it: the vocabulary
(open_clip's), a `turtle` module (it imports one by mistake, which needs Tk), the tiny config as its ViT-H-14, and the
weights that it first starts from, in a Hugging Face cache.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf.data.media import decode_image
from rlhf.rewards import tiny
from tests.rlhf.rewards.asking import hps_reward, score

SHAPES = (
    *((1312, 784), (784, 1312), (600, 600), (512, 512), (224, 224), (64, 64), (63, 63), (65, 65)),
    *((31, 17), (100, 37), (37, 100), (333, 777), (777, 333), (640, 480), (480, 640), (97, 1001), (1001, 97)),
    *((1200, 63), (8, 8), (1, 1), (2, 3), (129, 127), (720, 405), (959, 541)),
)
PROMPTS = (
    "cat with horn",
    "一只戴着皇冠的猫坐在红色的椅子上",
    "",
    "Keep the apple; blurred café — “warm” light &amp; 3.5€ 🍎",
    "  MANY   Spaces\n\tand capitals  ",
    "a very long instruction that goes on " * 30,
)
SCRIPT = """
import json, sys
from hpsv2.img_score import score
batches, checkpoint = json.load(sys.stdin)
json.dump([[float(one) for one in score(files, prompt, cp=checkpoint)] for files, prompt in batches], sys.stdout)
"""


@pytest.fixture(scope="module")
def installed():
    spec = importlib.util.find_spec("hpsv2")
    if spec is None:
        pytest.skip("the hpsv2 package is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_hpsv2(tmp_path_factory.mktemp("hps") / "tiny.pt", seed=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, installed):
    """Picture files: coarse coloured patches under fine noise of many shapes, and the package's own photo."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = []
    for height, width in SHAPES:
        patches = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(patches, dtype=np.int64) + rng.integers(-30, 31, (height, width, 3))
        files.append(folder / f"{height}x{width}.png")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], compress_level=1)
    return [*files, *installed.glob("assets/demo_image.jpg")]


@pytest.fixture(scope="module")
def package(tmp_path_factory, installed, checkpoint):
    """score([(picture files, prompt), …]) → the package's scores."""
    lib, home = tmp_path_factory.mktemp("lib"), tmp_path_factory.mktemp("home")
    copy = shutil.copytree(installed, lib / "hpsv2", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    vocabulary = Path(importlib.util.find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(vocabulary, copy / "src" / "open_clip")
    (copy / "src" / "open_clip" / "model_configs" / "ViT-H-14.json").write_text(json.dumps(tiny.CLIP_CONFIG))
    (lib / "turtle.py").write_text("forward = None")

    start = home / "hub" / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K"
    (start / "refs").mkdir(parents=True)
    (start / "refs" / "main").write_text("0")
    (start / "snapshots" / "0").mkdir(parents=True)
    other = torch.load(tiny.write_hpsv2(home / "other.pt", seed=4), weights_only=True)["state_dict"]
    torch.save(other, start / "snapshots" / "0" / "open_clip_pytorch_model.bin")

    # Without a card: there the package scores in fp16.
    variables = {"PYTHONPATH": str(lib), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HPS_ROOT": str(home / "root")}
    environment = os.environ | variables | {"CUDA_VISIBLE_DEVICES": ""}

    def score(batches):
        question = json.dumps([[[list(map(str, files)), prompt] for files, prompt in batches], str(checkpoint)])
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
        done = subprocess.run(
            command, input=question, env=environment, cwd=home, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return score


def test_scores_equal_the_packages_own_code(package, checkpoint, pictures):
    """Every picture with two of the prompts, up to the order of sums; how close they came is printed (pytest -s).

    eps × the terms of the longest sum, over the 3·8·8 pixels of a patch, × 1, the size of a cosine.
    """
    rounding = 3 * 8 * 8 * torch.finfo(torch.float32).eps
    count = len(PROMPTS)
    batches = [
        (pictures[index::count] + pictures[(index + 1) % count :: count], PROMPTS[index]) for index in range(count)
    ]
    reward = hps_reward(checkpoint)
    differences, spread = [], []
    for (files, prompt), expected in zip(batches, package(batches), strict=True):
        scores = score(reward, [decode_image(file.read_bytes()) for file in files], [prompt] * len(files))
        differences += np.abs(np.subtract(scores, expected)).tolist()
        spread += expected
    print(f"largest difference {max(differences):.1e} over {len(differences)} scores of {len(pictures)} pictures")
    assert len(differences) == 2 * len(pictures) >= 40 and np.std(spread) > 0.01
    assert max(differences) <= rounding


@pytest.mark.skipif("HPSV2_PATH" not in os.environ, reason="HPSV2_PATH names no HPSv2 v2.1 checkpoint (file or folder)")
def test_the_published_checkpoint_gives_the_known_answer(installed):
    """The package's photo with "cat with horn" scores 0.288 (v2.1)."""
    photo = installed / "assets" / "demo_image.jpg"
    if not photo.is_file():
        pytest.skip(f"the hpsv2 package has no {photo.name}")
    reward = hps_reward(os.environ["HPSV2_PATH"], version="v2.1")
    assert score(reward, [decode_image(photo.read_bytes())], ["cat with horn"]) == pytest.approx([0.288], abs=1e-3)
