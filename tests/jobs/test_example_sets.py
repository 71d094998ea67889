"""The examples of a recipe: what a run may go on with."""

from functools import partial

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
        refuse_other_examples(read_example_sets(config, ROLES, IN_THREADS), claim())
    (claim().path / "metrics.jsonl").write_text('{"step": 1}\n')
    refuse_other_examples(read_example_sets(config, ROLES, IN_THREADS), claim())
    file.write_text("\n".join(text[:2]))
    with pytest.raises(Refused, match=r"the pairs are not those that .* began with .* 3, are .* 2\)"):
        refuse_other_examples(read_example_sets(config, ROLES, IN_THREADS), claim())
