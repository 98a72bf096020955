import math
from collections import Counter

import numpy as np
import pytest

from modeling_querit.adaptation.scoring import make_rows, pairs_of, score_with_teachers
from modeling_querit.adaptation.teachers import pair_key
from modeling_querit.cache import SCORES, DiskCache

DOCUMENTS = {f"d{n}": {"_id": f"d{n}", "title": "", "text": f"text {n}"} for n in range(9)}
QUERIES = {"q0": "first", "q1": "second", "q2": "third"}
CANDIDATES = [
    {"query": "q0", "source": "d1", "documents": ["d0", "d1", "d2"]},
    {"query": "q1", "source": "d3", "documents": ["d3", "d4"]},
    {"query": "q2", "source": "d8", "documents": ["d5", "d6", "d7", "d8"]},
]
PAIRS = pairs_of(CANDIDATES, QUERIES, DOCUMENTS)


class Lengths:
    """A teacher that scores by lengths, except odd documents, and logs pairs and batch sizes."""

    def __init__(self, identity="lengths", batch_size=2, odd=None):
        self.identity, self.batch_size, self.odd = identity, batch_size, odd or {}
        self.scored, self.calls = [], []

    def score(self, pairs):
        self.calls.append(len(pairs))
        self.scored += [(query, document["_id"]) for query, document in pairs]
        return [self.odd.get(document["_id"], score_of(query, document)) for query, document in pairs]


class Constant:
    """A teacher that gives every pair the same score."""

    identity, batch_size = "constant", 8

    def score(self, pairs):
        return [1.0] * len(pairs)


def score_of(query, document):
    return len(query) + int(document["_id"][1:]) / 10


def rows_in(folder, teachers, dropped=None):
    dropped = Counter() if dropped is None else dropped
    return list(make_rows(CANDIDATES, QUERIES, DOCUMENTS, teachers, folder, dropped))


def test_pairs_join_queries_with_their_candidates():
    assert [(query, document["_id"]) for query, document in PAIRS[:5]] == [
        ("first", "d0"),
        ("first", "d1"),
        ("first", "d2"),
        ("second", "d3"),
        ("second", "d4"),
    ]
    assert len(PAIRS) == 9


def test_cached_pairs_are_not_scored_again(tmp_path):
    teacher, second = Lengths(batch_size=4), Lengths(batch_size=3)
    assert score_with_teachers({"a": teacher}, PAIRS, tmp_path) == Counter()
    assert teacher.calls == [4, 4, 1]
    assert len(set(teacher.scored)) == 9
    score_with_teachers({"a": second}, PAIRS, tmp_path)
    assert second.scored == []
    more = [*PAIRS, ("fourth", DOCUMENTS["d0"])]
    score_with_teachers({"a": second}, more, tmp_path)
    assert second.scored == [("fourth", "d0")]


def test_a_repeated_pair_is_scored_once(tmp_path):
    teacher = Lengths(batch_size=4)
    score_with_teachers({"a": teacher}, [PAIRS[0], PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[0]], tmp_path)
    assert teacher.scored == [("first", "d0"), ("first", "d1"), ("first", "d2")]


def test_another_identity_scores_again(tmp_path):
    score_with_teachers({"a": Lengths()}, PAIRS, tmp_path)
    other = Lengths("other prompt")
    score_with_teachers({"a": other}, PAIRS, tmp_path)
    assert len(other.scored) == 9


def test_every_teacher_has_a_cache_of_its_own(tmp_path):
    score_with_teachers({"a": Lengths(), "b": Lengths()}, PAIRS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    cache = DiskCache(tmp_path / "b", SCORES)
    assert cache[pair_key(Lengths(), PAIRS[3])] == score_of(*PAIRS[3])


@pytest.mark.parametrize("name", ["models/teacher", "../teacher", "..", "/tmp/teacher", "a.b"])
def test_a_teacher_may_be_named_after_a_path(tmp_path, name):
    folder = tmp_path / "scores"
    score_with_teachers({name: Lengths(), "another": Lengths()}, PAIRS, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    assert len(list(folder.iterdir())) == 2
    assert len(rows_in(folder, {name: Lengths()})) == 3


def test_a_server_with_cached_scores_is_marked_as_working(tmp_path):
    """A refusal is then the fault of that pair."""

    class Remote(Lengths):
        def __init__(self):
            super().__init__()
            self.endpoint, self.is_working = self, False

        def mark_as_working(self):
            self.is_working = True

    first, second, third = Remote(), Remote(), Remote()
    score_with_teachers({"a": first}, PAIRS[:3], tmp_path)
    score_with_teachers({"a": second}, PAIRS[3:], tmp_path)
    score_with_teachers({"a": third}, PAIRS, tmp_path)
    assert [teacher.is_working for teacher in (first, second, third)] == [False, False, True]


def test_batches_scored_before_an_error_are_cached(tmp_path):
    class Failing(Lengths):
        def score(self, pairs):
            if len(self.calls) == 2:
                raise RuntimeError("killed")
            return super().score(pairs)

    with pytest.raises(RuntimeError, match="killed"):
        score_with_teachers({"a": Failing()}, PAIRS, tmp_path)
    teacher = Lengths()
    score_with_teachers({"a": teacher}, PAIRS, tmp_path)
    assert len(teacher.scored) == 9 - 4


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_scores_is_named(tmp_path, change):
    class Miscounting(Lengths):
        def score(self, pairs):
            return [0.5] * (len(pairs) + change)

    with pytest.raises(ValueError, match=f"Teacher 'a' returned {2 + change} scores for 2 pairs"):
        score_with_teachers({"a": Miscounting()}, PAIRS, tmp_path)
    assert len(DiskCache(tmp_path / "a", SCORES)) == 0


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_scores_that_are_not_finite_are_counted_and_dropped(tmp_path, odd):
    class Odd(Lengths):
        def score(self, pairs):
            scores = super().score(pairs)
            return [odd if score == "odd" else score for score in scores]

    teachers = {"good": Lengths(), "bad": Odd(odd={"d1": "odd", "d6": "odd"})}
    assert score_with_teachers(teachers, PAIRS, tmp_path) == {"good": 0, "bad": 2}
    assert len(DiskCache(tmp_path / "bad", SCORES)) == 7
    dropped = Counter()
    rows = rows_in(tmp_path, teachers, dropped)
    assert [[document["text"] for document in row["documents"]] for row in rows] == [
        ["text 0", "text 2"],
        ["text 3", "text 4"],
        ["text 5", "text 7", "text 8"],
    ]
    assert dropped == {"document without score": 2}
    # A row without its source has no positive.
    assert [row["positive"] for row in rows] == [None, 0, 2]
    # The next run scores these again, and nothing else.
    mended = Lengths()
    score_with_teachers({"bad": mended}, PAIRS, tmp_path)
    assert mended.scored == [("first", "d1"), ("third", "d6")]


@pytest.mark.parametrize("kind", [int, np.float32, np.float64])
def test_scores_may_be_numbers_of_any_type(tmp_path, kind):
    score_with_teachers({"a": Lengths(odd={"d0": kind(3)})}, PAIRS[:2], tmp_path)
    assert DiskCache(tmp_path / "a", SCORES)[pair_key(Lengths(), PAIRS[0])] == 3.0


def test_rows_have_the_scores_of_all_teachers(tmp_path):
    teachers = {"a": Lengths(), "b": Lengths("b", odd={"d1": -4.0})}
    score_with_teachers(teachers, PAIRS, tmp_path)
    dropped = Counter()
    rows = rows_in(tmp_path, teachers, dropped)
    assert rows[0] == {
        "query": "first",
        "documents": [{"title": "", "text": f"text {n}"} for n in range(3)],
        "scores": {"a": [5.0, 5.1, 5.2], "b": [5.0, -4.0, 5.2]},
        "source": "q0",
        "positive": 1,
    }
    assert [row["positive"] for row in rows] == [1, 0, 3]
    assert dropped == {}


def test_the_copied_passage_is_masked_for_the_student(tmp_path):
    documents = {
        name: {"_id": name, "title": name, "text": f"There is a {name} in a wood. Both say this."}
        for name in ("fox", "hen")
    }
    queries = {f"q{n}": "Both say this." for n in range(200)}
    candidates = [{"query": query, "source": "fox", "documents": ["hen", "fox"]} for query in queries]
    teacher = Constant()
    score_with_teachers({"a": teacher}, pairs_of(candidates, queries, documents), tmp_path)

    def masked(share, seed=0):
        rows = make_rows(candidates, queries, documents, {"a": teacher}, tmp_path, Counter(), share, seed)
        return [[document["text"] for document in row["documents"]] for row in rows]

    whole = [f"There is a {name} in a wood. Both say this." for name in ("hen", "fox")]
    without = [whole[0], "There is a fox in a wood."]
    assert masked(0.0) == [whole] * 200
    assert masked(1.0) == [without] * 200
    most = masked(0.9)
    assert most.count(without) in range(160, 200)
    assert most.count(whole) == 200 - most.count(without)
    assert masked(0.9) == most != masked(0.9, seed=1)


def test_a_query_with_one_scored_document_is_dropped(tmp_path):
    teachers = {"a": Lengths(odd={"d3": math.nan})}
    score_with_teachers(teachers, PAIRS, tmp_path)
    dropped = Counter()
    assert [row["source"] for row in rows_in(tmp_path, teachers, dropped)] == ["q0", "q2"]
    assert dropped == {"document without score": 1, "query with fewer than two documents": 1}


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_divide_the_pairs(tmp_path, processes):
    alone = {"a": Lengths()}
    score_with_teachers(alone, PAIRS, tmp_path / "alone")
    teachers = [Lengths() for _ in range(processes)]
    for number, teacher in enumerate(teachers):
        # Each has a folder of its own, so that none sees the scores of another.
        score_with_teachers({"a": teacher}, PAIRS, tmp_path / str(number), process=number, processes=processes)
    assert sorted(pair for teacher in teachers for pair in teacher.scored) == sorted(alone["a"].scored)
    together = tmp_path / "together" / "a"
    together.mkdir(parents=True)
    for path in [*tmp_path.glob("[0-9]/a/*.parquet")]:
        path.rename(together / path.name)
    assert rows_in(tmp_path / "together", alone) == rows_in(tmp_path / "alone", alone)
    assert len(rows_in(tmp_path / "alone", alone)) == 3


def test_progress_is_reported(tmp_path):
    counts = []
    score_with_teachers({"a": Lengths(batch_size=4)}, PAIRS, tmp_path, advance=counts.append)
    score_with_teachers({"a": Lengths(batch_size=4)}, PAIRS, tmp_path, advance=counts.append)
    assert counts == [4, 4, 1] * 2
