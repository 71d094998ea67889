"""The examples of a recipe: what a run may go on with."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from actors import checks
from jobs.example_sets import read_example_sets, refuse_other_examples
from rlhf.errors import Refused
from rlhf.models.tiny import write_stable_diffusion
from rlhf.runs.folder import RunFolder
from tests.jobs.offline_world import offline_config
from tests.rlhf.data.pair_tables import write_jsonl

IN_THREADS = partial(checks.in_threads, str)
ROLES = ("winner", "loser")


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def test_a_run_does_not_go_on_with_other_pairs_but_a_start_that_did_nothing_may(stable_diffusion, tmp_path):
    file = write_jsonl(tmp_path, 4)
    config = offline_config(tmp_path, stable_diffusion, file, eval={"path": None})

    def claim():
        folder = RunFolder.claim(tmp_path / "runs", "name", "")
        folder.release()
        return folder

    for lines in (4, 3):  # the second has other pairs, and no step was done with the first
        text = file.read_text().splitlines()
        file.write_text("\n".join(text[:lines]))
        refuse_other_examples(read_example_sets(config, ROLES, IN_THREADS), claim(), 2)
    (claim().path / "metrics.jsonl").write_text('{"step": 1}\n')
    refuse_other_examples(read_example_sets(config, ROLES, IN_THREADS), claim(), 2)
    file.write_text("\n".join(text[:2]))
    with pytest.raises(Refused, match=r"the pairs are not those that .* began with .* 3, are .* 2\)"):
        refuse_other_examples(read_example_sets(config, ROLES, IN_THREADS), claim(), 2)


def test_where_batches_are_made_of_kinds_their_size_may_not_change(stable_diffusion, tmp_path):
    """Which examples meet in a batch depends on it; where all are of one kind it may."""
    file = write_jsonl(tmp_path, 4)
    config = offline_config(tmp_path, stable_diffusion, file, eval={"path": None})
    one = read_example_sets(config, ROLES, IN_THREADS)
    place = replace(one.training.place, buckets=np.array([0, 0, 1, 1], np.int32))
    several = replace(one, training=replace(one.training, place=place))
    for number, (examples, may) in enumerate(((one, True), (several, False))):
        folder = RunFolder.claim(tmp_path / str(number), "run", "")
        refuse_other_examples(examples, folder, 2)
        folder.release()
        (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
        again = RunFolder.claim(tmp_path / str(number), "run", "")
        if may:
            refuse_other_examples(examples, again, 4)
        else:
            with pytest.raises(Refused, match=r"in batches of 2, are .* in batches of 4"):
                refuse_other_examples(examples, again, 4)
