import pytest

from benchmarks import contest


@pytest.mark.slow
def test_mteb_is_scaled_to_all_pairs(subject, task):
    pytest.importorskip("mteb")
    rows = contest.compare(subject, task, ["mteb"], 1, mteb_documents=1, with_ablations=False)
    (mteb_row,) = (row for row in rows if row["against"] == "mteb")
    assert mteb_row["pairs_timed_against"] == 1
    assert mteb_row["max_score_difference"] < 1e-3
    assert "1 of 4 pairs" in mteb_row["remarks"]


def test_scores_that_are_not_ours_end_the_run():
    with pytest.raises(SystemExit, match="theirs"):
        contest.check_scores({contest.OURS: [0.1, 0.2], "theirs": [0.2, 0.1]}, is_exact=True)
    with pytest.raises(SystemExit, match="theirs"):
        contest.check_scores({contest.OURS: [0.1, 0.2], "theirs": [float("nan"), 0.1]}, is_exact=False)
