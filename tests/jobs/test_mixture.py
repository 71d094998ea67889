"""Data sets mixed by weight in jobs.train: what is trained, what is not even encoded, and a resume that goes on in the middle."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors import checks
from jobs import train
from jobs.example_sets import read_example_sets, tasks_of, wanted
from jobs.recipes import TrainRecipe
from rlhf.errors import Refused
from rlhf.models.tiny_qwen_image import write_qwen_image_edit
from tests.jobs.test_strange import rows_of, tables
from tests.rlhf.data.pair_tables import png

IN_THREADS = partial(checks.in_threads, str)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen_image_edit(tmp_path_factory.mktemp("models") / "qwen", texts=("warm",))


def write_root(root):
    """shop: 4 targets with one source and 2 with none; Street-View: 3 with two; unused: 5 with one."""
    for name, counts in (("shop", (1, 1, 1, 1, 0, 0)), ("Street-View", (2, 2, 2)), ("unused", (1,) * 5)):
        (root / name).mkdir(parents=True)
        lines = []
        for i, count in enumerate(counts):
            files = [f"{i}.png", *(f"{i}_{j}.png" for j in range(count))]
            for j, file in enumerate(files):
                (root / name / file).write_bytes(png(100 * len(name) + 10 * i + j, 48, 32))
            line = {"prompt": "warm", "target": files[0]} | ({"source": files[1:]} if count else {})
            lines.append(json.dumps(line))
        (root / name / "rows.jsonl").write_text("\n".join(lines))
    return root


def recipe(folder, model, **data):
    data = {
        "path": str(folder / "root"),
        "cache": str(folder / "cache"),
        "hflip": False,
        "caption_dropout": 0.0,
        **data,
    }
    found = tables(folder, model, "full", model={"family": "qwen_image_edit"}, objective="sft", data=data, eval={})
    return TrainRecipe.model_validate(found | {"trainable": {"kind": "lora", "rank": 2}})


def examples(config):
    return read_example_sets(config, ("target",), IN_THREADS).training


@pytest.fixture
def folder(tmp_path):
    write_root(tmp_path / "root")
    return tmp_path


def test_kinds_are_of_one_task_and_number_and_share_by_the_weights(folder, model):
    config = recipe(folder, model, task_weights={"shop": 1.0, "Street-View": 3.0})
    found = examples(config)
    tasks, place = tasks_of(found, folder / "root"), found.place
    assert tasks == ["shop"] * 6 + ["Street-View"] * 3, "the other folder is not read"
    assert place.shares.sum() == pytest.approx(1)
    by_row = place.shares[place.buckets] / np.bincount(place.buckets)[place.buckets]
    assert by_row == pytest.approx([1 / 24] * 6 + [1 / 4] * 3)


def test_examples_that_are_never_drawn_are_not_encoded(folder, model):
    whole = recipe(folder, model, task_weights={"shop": 1.0})
    some = recipe(folder, model, task_weights={"shop": 1.0}, source_count_weights={"0": 1.0})
    both = [
        {
            source.path.rsplit("/", 1)[-1]
            for encoding in wanted(config, ("target",), sets)
            for source in encoding.sources
        }
        for config, sets in ((config, read_example_sets(config, ("target",), IN_THREADS)) for config in (whole, some))
    ]
    assert both == [{f"{i}.png" for i in range(6)} | {f"{i}_0.png" for i in range(4)}, {"4.png", "5.png"}]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"task_weights": {"shp": 1.0}}, r"names 'shp', which is no folder of data\.path = .*: did you mean 'shop'\?"),
        (
            {"task_weights": {"shop": 1.0}, "source_count_weights": {"3": 1.0}},
            r"gives 3 sources a weight, but .* \(2 with 0, 4 with 1\)",
        ),
    ],
)
def test_weights_that_nothing_answers_are_refused(folder, model, weights, says):
    with pytest.raises(Refused, match=says):
        examples(recipe(folder, model, **weights))


MIX = {
    ("a", 0, "wide"): 1,
    ("a", 1, "wide"): 2,
    ("a", 1, "tall"): 6,
    ("b", 1, "wide"): 3,
    ("b", 2, "wide"): 4,
    ("b", 2, "tall"): 1,
    ("b", 3, "tall"): 2,
}
"""Examples by data set, number of sources and shape."""
MIX_WEIGHTS = {"a": 0.5, "b": 1.2}, {"0": 1.0, "1": 1.0, "2": 2.0, "3": 0.0}
WITHIN = {
    ("a", 0, "wide"): 1 / 2,
    ("a", 1, "wide"): 1 / 2 * 2 / 8,
    ("a", 1, "tall"): 1 / 2 * 6 / 8,
    ("b", 1, "wide"): 1 / 3,
    ("b", 2, "wide"): 2 / 3 * 4 / 5,
    ("b", 2, "tall"): 2 / 3 * 1 / 5,
    ("b", 3, "tall"): 0,
}
"""The probability of each within its data set, by hand: sources 1 : 1 and 1 : 2, shapes as there are examples."""


@pytest.mark.parametrize("batch_size", [1, 2])
def test_of_10000_draws_every_data_set_count_and_shape_has_its_share(tmp_path, model, batch_size):
    """χ² with 5 degrees of freedom, whose p is below 1e-4 for one seed in ten thousand; this seed's is fixed."""
    kinds = [kind for kind, count in MIX.items() for _ in range(count)]
    for i, (name, count, shape) in enumerate(kinds):
        (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
        size = (64, 32) if shape == "wide" else (32, 64)
        for j in range(count + 1):
            (tmp_path / "root" / name / f"{i}_{j}.png").write_bytes(png(10 * i + j, *size))
        line = {"prompt": "warm", "target": f"{i}_0.png", "source": [f"{i}_{j}.png" for j in range(1, count + 1)]}
        with (tmp_path / "root" / name / "rows.jsonl").open("a") as lines:
            lines.write(json.dumps({key: value for key, value in line.items() if value}) + "\n")
    tasks, counts = MIX_WEIGHTS
    buckets = {"step": 16, "min_side": 16}
    config = recipe(tmp_path, model, task_weights=tasks, source_count_weights=counts, buckets=buckets)
    trainer = config.trainer.model_copy(update={"train_batch_size": batch_size})
    config = config.model_copy(update={"trainer": trainer})
    stream = train.stream_of(config, examples(config))
    seen = Counter(kinds[stream[batch * batch_size].row] for batch in range(10_000))
    weights = {"a": 5 / 17, "b": 12 / 17}
    expected = {kind: 10_000 * weights[kind[0]] * within for kind, within in WITHIN.items() if within}
    assert seen.keys() == expected.keys()
    squared = sum((seen[kind] - count) ** 2 / count for kind, count in expected.items())
    assert torch.special.gammaincc(torch.tensor(5 / 2), torch.tensor(squared / 2)) > 1e-4, (squared, seen)


def test_a_data_set_may_have_a_caption_dropout_of_its_own(folder, model):
    """Of what is never trained without its caption no empty one is encoded."""
    config = recipe(
        folder,
        model,
        task_weights={"shop": 1.0, "Street-View": 1.0},
        caption_dropout=0.5,
        task_caption_dropout={"shop": 0.0},
    )
    sets = read_example_sets(config, ("target",), IN_THREADS)
    texts = Counter((e.text, len(e.sources)) for e in wanted(config, ("target",), sets) if e.text is not None)
    assert texts == {("warm", 1): 4, ("warm", 0): 2, ("warm", 2): 3, (" ", 2): 3}
    visits = [train.stream_of(config, sets.training)[place] for place in range(2000)]
    shop = [visit.blank for visit in visits if visit.row < 6]
    street = [visit.blank for visit in visits if visit.row >= 6]
    assert not any(shop) and 0.4 < np.mean(street) < 0.6 and len(shop) > 500
    with pytest.raises(
        ValidationError, match=r"task_caption_dropout names 'street', which has no weight in task_weights"
    ):
        recipe(folder, model, task_weights={"shop": 1.0}, task_caption_dropout={"street": 0.1})


def test_data_sets_whose_names_are_alike_are_logged_apart(folder, model):
    (folder / "root" / "unused").rename(folder / "root" / "street_view")
    config = recipe(folder, model, task_weights={"shop": 1.0, "Street-View": 1.0, "street_view": 1.0})
    counted = [train.contributed(config, examples(config))(step) for step in range(1, 9)]
    assert {*counted[0]} == {"data/shop", "data/street_view_0", "data/street_view_2"}
    assert all(sum(one.values()) == config.trainer.pairs_per_step for one in counted)


def test_weights_of_0_alone_are_refused(folder, model):
    with pytest.raises(
        ValidationError, match=r"task_weights = \{'shop': 0\.0\} are all 0, so nothing would be trained"
    ):
        recipe(folder, model, task_weights={"shop": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize("latents", ["cached", "on_the_fly"])
def test_a_mixture_trains_and_goes_on_in_the_middle(cluster, folder, model, latents):
    """Two ranks, batches of two. What each data set gave is logged, and a run begun from step 2 repeats steps 3 and 4."""
    weights = {
        "task_weights": {"shop": 1.0, "Street-View": 3.0},
        "source_count_weights": {"0": 1.0, "1": 1.0, "2": 1.0},
    }
    config = recipe(folder, model, latents=latents, **weights)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"train_batch_size": 2})})
    path = train.run(config)
    steps = [row for row in rows_of(path) if "train/loss" in row]
    assert [row["data/shop"] + row["data/street_view"] for row in steps] == [8.0] * 4
    assert sum(row["data/street_view"] for row in steps) > 0 and all(row["data/shop"] % 2 == 0 for row in steps)
    named = config.run.model_copy(update={"resume": str(path / "checkpoint_000002")})
    again = train.run(config.model_copy(update={"run": named}))
    rows = [row for row in rows_of(again) if "train/loss" in row and row["step"] > 2]
    for row, other in zip(rows, steps[2:], strict=True):
        assert {name: row[name] for name in row if not name.startswith("time/")} == {
            name: other[name] for name in other if not name.startswith("time/")
        }
