"""Plans for thread-block clusters in place of the heuristic's, to count and compile what the tuner may find faster."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from triton_norm import autotune
from triton_norm.tuning.candidates import Work, cluster
from triton_norm.tuning.plan import Plan


@contextmanager
def clusters(wanted: bool = True) -> Iterator[None]:
    """Inside the block rows that are split otherwise are held by clusters, as far as they fit in one."""
    if not wanted:
        yield
        return
    heuristic = Work.heuristic

    def plan(work: Work) -> Plan:
        chosen = heuristic(work)
        return chosen if chosen.regime == "persistent" else cluster(work) or chosen

    # Entering the mode also has calls forgotten that were bound with other plans, and leaving it those with these.
    with mock.patch.object(Work, "heuristic", plan), autotune.mode("0"):
        yield
