import pytest

from modeling_querit.pair_encoding_querit import EncodedPair
from modeling_querit.serving.jobs import Job, Options


def job(lengths, known=None, query="q", shared=4):
    """Pairs of one query whose first tokens are the same."""
    encoded = [
        EncodedPair([*range(shared), *[100 + index] * (length - shared)]) for index, length in enumerate(lengths)
    ]
    return Job(
        [(query, str(index)) for index in range(len(lengths))], Options(), encoded, known or [None] * len(lengths)
    )


def test_a_shared_prefix_is_work_once():
    assert job([10, 10, 10]).work == 4 + 3 * 6
    assert job([10]).work == 10
    assert job([10, 10, 10]).tokens == 30


def test_known_scores_are_no_work():
    whole = job([10, 10], known=[0.5, 0.25])
    assert whole.is_complete
    assert whole.work == 0
    assert job([10, 10, 10], known=[0.5, None, None]).work == 4 + 2 * 6


def test_pairs_are_taken_in_order_as_long_as_they_fit():
    whole, queries = job([10, 10, 10]), set()
    taken, used = whole.take(17, queries, at_least_one=False)
    assert (taken.indices, used, queries) == ([0, 1], 16, {"q"})
    assert whole.waiting == 1
    assert whole.take(9, set(), at_least_one=False)[0].indices == []
    assert whole.take(9, set(), at_least_one=True)[0].indices == [2]


def test_scores_come_in_the_order_of_the_pairs():
    whole = job([10, 10, 10], known=[None, 0.5, None])
    taken, _ = whole.take(100, set(), at_least_one=True)
    assert taken.indices == [0, 2]
    whole.add_scores([2], [0.3])
    assert not whole.is_complete
    whole.add_scores([0], [0.1])
    assert whole.finish()
    assert whole.future.result() == [0.1, 0.5, 0.3]


def test_a_cancelled_job_is_not_finished():
    whole = job([10])
    whole.future.cancel()
    assert not whole.finish()
    whole.fail(ValueError())
    assert whole.future.cancelled()


def test_a_failed_job_raises():
    whole = job([10, 10])
    whole.fail(ValueError("broken"))
    assert whole.waiting == 0
    with pytest.raises(ValueError, match="broken"):
        whole.future.result()
