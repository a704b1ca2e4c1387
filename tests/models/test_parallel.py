"""Fused networks under DistributedDataParallel and fully_shard, in two processes."""

import pytest
import ranks
from parallel import CASES, RANKS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return ranks.run("parallel", RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_like_one_process(outcomes, case):
    failed = {rank: error for rank, error in enumerate(outcomes[case]) if error}
    assert not failed, "\n".join(f"rank {rank}: {error}" for rank, error in failed.items())
