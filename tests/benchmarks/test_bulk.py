import sys

import pytest

from benchmarks import bulk


@pytest.mark.slow
def test_a_killed_run_gives_the_same_bytes(tmp_path, forked_python, monkeypatch):
    """The kills, the other number of processes, and the comparison are the benchmark's own."""
    monkeypatch.setattr(sys, "executable", forked_python)
    rows = bulk.measure(tmp_path, pairs=6000, kills=1, processes=[2], seed=0)
    assert [(row["processes"], row.get("kills", 0)) for row in rows] == [(2, 0), (1, 1)]
    assert all(row["mib_peak"] >= row["mib_in_first_quarter"] > 0 for row in rows)
