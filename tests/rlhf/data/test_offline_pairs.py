"""From a place in the stream to tensors: the right latents for the right side, whichever way they come."""

import numpy as np
import pytest
import torch

from rlhf.data.batches import draws
from rlhf.data.cache import ConditionCache, commit, write_part
from rlhf.data.examples import check_block, gather
from rlhf.data.offline_pairs import HandedPairs, PairKeys, PicturePairs, batch_of
from rlhf.data.pair_files import blocks_of
from rlhf.data.stream import Visit
from rlhf.diffusion.process import RectifiedFlow
from tests.rlhf.data.pair_tables import row, write_jsonl, write_parquet

KEYS = PairKeys(height=16, width=16, text="t", target="v", source=None)


def visit(row, mirrored=False, blank=False):
    return Visit(row=row, mirrored=mirrored, blank=blank, crop=(0.5, 0.5))


def index_of(file, needs_source=False):
    blocks = blocks_of(file)
    return gather(blocks, [check_block(i, b, needs_source=needs_source, items=None) for i, b in enumerate(blocks)])[0]


def number(key: str) -> float:
    """A value that tells a key from every other."""
    return int(key[:6], 16) / 1000


def filled(folder, index, keys):
    """A cache whose every row holds its key's number."""
    rows = {}
    for pair in (index[i] for i in range(len(index))):
        for mirrored in (False, True):
            for key in keys.target_keys(pair, mirrored):
                rows[key] = {"latents": torch.full((4, 2, 2), number(key))}
            if keys.source:
                key = keys.source_key(pair, mirrored)
                rows[key] = {"source_latents": torch.full((4, 2, 2), number(key))}
    for caption in (*index.captions(), ""):
        key = keys.text_key(caption)
        rows[key] = {"prompt_embeds": torch.full((3, 5), number(key))}
    commit(folder, [write_part(folder, [(key, tensors, None) for key, tensors in rows.items()])])
    return ConditionCache(folder)


def test_winner_and_loser_follow_the_label_and_mirrored_pairs_are_other_rows(tmp_path):
    index = index_of(write_parquet(tmp_path / "p.parquet", [row(i, label=i % 2) for i in range(4)]))
    pairs = PicturePairs(index, filled(tmp_path / "cache", index, KEYS), KEYS)
    visits = [visit(0), visit(1), visit(1, mirrored=True), visit(3, blank=True)]
    winner, loser = pairs.sides(visits)
    assert winner.shape == (4, 4, 2, 2) and winner.dtype == torch.float32
    for i, v in enumerate(visits):
        first, second = KEYS.target_keys(index[v.row], v.mirrored)
        sides = (second, first) if v.row % 2 == 0 else (first, second)
        assert (winner[i] == number(sides[0])).all() and (loser[i] == number(sides[1])).all()
    captions = pairs.condition(visits)["prompt_embeds"][:, 0, 0]
    wanted = [KEYS.text_key(caption) for caption in ("a dish 0", "a dish 1", "a dish 1", "")]
    assert captions.tolist() == pytest.approx([number(key) for key in wanted])


def test_edit_families_get_the_source_mirrored_with_its_pair(tmp_path):
    keys = PairKeys(height=16, width=16, text="t", target="v", source="s")
    index = index_of(write_jsonl(tmp_path, 2, source=True), needs_source=True)
    pairs = PicturePairs(index, filled(tmp_path / "cache", index, keys), keys)
    condition = pairs.condition([visit(1), visit(1, mirrored=True)])
    assert set(condition) == {"prompt_embeds", "source_latents"}
    plain, mirrored = condition["source_latents"][:, 0, 0, 0].tolist()
    assert plain == pytest.approx(number(keys.source_key(index[1], False)))
    assert mirrored == pytest.approx(number(keys.source_key(index[1], True))) != plain


def test_handed_latents_take_the_place_of_cached_ones_and_captions_stay(tmp_path):
    index = index_of(write_parquet(tmp_path / "p.parquet", [row(i) for i in range(3)]))
    cached = PicturePairs(index, filled(tmp_path / "cache", index, KEYS), KEYS)
    visits = [visit(2), visit(0)]
    handed = [
        {
            name: np.full((4, 2, 2), i + at, np.float32)
            for at, name in ((0, "winner"), (0.5, "loser"), (0.25, "source_latents"))
        }
        for i in range(2)
    ]
    pairs = HandedPairs(cached, dict(zip(visits, handed, strict=True)))
    winner, loser = pairs.sides(visits[::-1])
    assert winner[:, 0, 0, 0].tolist() == [1, 0] and loser[:, 0, 0, 0].tolist() == [1.5, 0.5]
    condition = pairs.condition(visits)
    assert condition["source_latents"][:, 0, 0, 0].tolist() == [0.25, 1.25]
    assert torch.equal(condition["prompt_embeds"], cached.condition(visits)["prompt_embeds"])


def test_a_batch_has_the_noise_of_its_indices(tmp_path):
    index = index_of(write_parquet(tmp_path / "p.parquet", [row(i) for i in range(3)]))
    pairs = PicturePairs(index, filled(tmp_path / "cache", index, KEYS), KEYS)
    batch = batch_of(pairs, [visit(0), visit(2)], RectifiedFlow(), seed=5, step=3, first_index=4)
    t, noise = draws(RectifiedFlow(), seed=5, step=3, indices=range(4, 6), shape=(4, 2, 2))
    assert torch.equal(batch.t, t) and torch.equal(batch.noise, noise)
