"""Fixtures that are dear to start and shared by a whole session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def kontext(tmp_path_factory):
    """A tiny Kontext folder."""
    from rlhf.models.tiny import write_flux_kontext

    return write_flux_kontext(tmp_path_factory.mktemp("models") / "kontext")


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    ranks = Ranks(1, tmp_path_factory.mktemp("one_rank"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.stop()
