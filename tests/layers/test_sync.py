"""Synchronized batch norm, of three processes."""

import pytest
import ranks
from synchronized import CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return ranks.run("synchronized", 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_share_a_batch(outcomes, case):
    failed = {rank: error for rank, error in enumerate(outcomes[case]) if error}
    assert not failed, "\n".join(f"rank {rank}: {error}" for rank, error in failed.items())
