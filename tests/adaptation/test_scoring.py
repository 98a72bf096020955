import math
from collections import Counter

import numpy as np
import pyarrow
import pytest

from modeling_querit.adaptation.scoring import pairs_of, rows_of, score_pairs
from modeling_querit.adaptation.shards import Shards
from modeling_querit.adaptation.teachers import pair_key

DOCUMENTS = {f"d{n}": {"_id": f"d{n}", "title": "", "text": f"text {n}"} for n in range(9)}
QUERIES = {"q0": "first", "q1": "second", "q2": "third"}
CANDIDATES = [
    {"query": "q0", "source": "d1", "documents": ["d0", "d1", "d2"]},
    {"query": "q1", "source": "d3", "documents": ["d3", "d4"]},
    {"query": "q2", "source": "d8", "documents": ["d5", "d6", "d7", "d8"]},
]
PAIRS = pairs_of(CANDIDATES, QUERIES, DOCUMENTS)


class Lengths:
    """A teacher that keeps what it is asked, and scores some documents otherwise."""

    def __init__(self, identity="lengths", batch_size=2, odd=None):
        self.identity, self.batch_size, self.odd = identity, batch_size, odd or {}
        self.asked, self.calls = [], []

    def score(self, pairs):
        self.calls.append(len(pairs))
        self.asked += [(query, document["_id"]) for query, document in pairs]
        return [self.odd.get(document["_id"], score_of(query, document)) for query, document in pairs]


class Constant:
    """A teacher that likes everything."""

    identity, batch_size = "constant", 8

    def score(self, pairs):
        return [1.0] * len(pairs)


def score_of(query, document):
    return len(query) + int(document["_id"][1:]) / 10


def rows_in(folder, teachers, left_out=None):
    left_out = Counter() if left_out is None else left_out
    return list(rows_of(CANDIDATES, QUERIES, DOCUMENTS, teachers, folder, left_out))


def test_pairs_are_those_of_the_candidates():
    assert [(query, document["_id"]) for query, document in PAIRS[:5]] == [
        ("first", "d0"),
        ("first", "d1"),
        ("first", "d2"),
        ("second", "d3"),
        ("second", "d4"),
    ]
    assert len(PAIRS) == 9


def test_nothing_is_asked_twice(tmp_path):
    teacher, again = Lengths(batch_size=4), Lengths(batch_size=3)
    assert score_pairs({"a": teacher}, PAIRS, tmp_path) == Counter()
    assert teacher.calls == [4, 4, 1]
    assert len(set(teacher.asked)) == 9
    score_pairs({"a": again}, PAIRS, tmp_path)
    assert again.asked == []
    more = [*PAIRS, ("fourth", DOCUMENTS["d0"])]
    score_pairs({"a": again}, more, tmp_path)
    assert again.asked == [("fourth", "d0")]


def test_a_pair_that_comes_twice_is_asked_once(tmp_path):
    teacher = Lengths(batch_size=4)
    score_pairs({"a": teacher}, [PAIRS[0], PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[0]], tmp_path)
    assert teacher.asked == [("first", "d0"), ("first", "d1"), ("first", "d2")]


def test_another_identity_is_asked_anew(tmp_path):
    score_pairs({"a": Lengths()}, PAIRS, tmp_path)
    other = Lengths("other prompt")
    score_pairs({"a": other}, PAIRS, tmp_path)
    assert len(other.asked) == 9


def test_each_teacher_has_a_folder(tmp_path):
    score_pairs({"a": Lengths(), "b": Lengths()}, PAIRS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    kept = Shards(tmp_path / "b", pyarrow.float64())
    assert kept[pair_key(Lengths(), PAIRS[3])] == score_of(*PAIRS[3])


@pytest.mark.parametrize("name", ["models/teacher", "../teacher", "..", "/tmp/teacher", "a.b"])
def test_a_teacher_may_be_named_after_a_path(tmp_path, name):
    folder = tmp_path / "scores"
    score_pairs({name: Lengths(), "another": Lengths()}, PAIRS, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    assert len(list(folder.iterdir())) == 2
    assert len(rows_in(folder, {name: Lengths()})) == 3


def test_a_server_that_scored_before_is_known_to_answer(tmp_path):
    """It is told that what it refuses is one pair's fault."""

    class Remote(Lengths):
        def __init__(self):
            super().__init__()
            self.endpoint, self.known = self, False

        def known_to_answer(self):
            self.known = True

    first, second, third = Remote(), Remote(), Remote()
    score_pairs({"a": first}, PAIRS[:3], tmp_path)
    score_pairs({"a": second}, PAIRS[3:], tmp_path)
    score_pairs({"a": third}, PAIRS, tmp_path)
    assert [each.known for each in (first, second, third)] == [False, False, True]


def test_what_was_scored_before_an_error_is_kept(tmp_path):
    class Failing(Lengths):
        def score(self, pairs):
            if len(self.calls) == 2:
                raise RuntimeError("killed")
            return super().score(pairs)

    with pytest.raises(RuntimeError, match="killed"):
        score_pairs({"a": Failing()}, PAIRS, tmp_path)
    teacher = Lengths()
    score_pairs({"a": teacher}, PAIRS, tmp_path)
    assert len(teacher.asked) == 9 - 4


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_scores_is_named(tmp_path, change):
    class Miscounting(Lengths):
        def score(self, pairs):
            return [0.5] * (len(pairs) + change)

    with pytest.raises(ValueError, match=f"Teacher 'a' was asked for 2 scores and gave {2 + change}"):
        score_pairs({"a": Miscounting()}, PAIRS, tmp_path)
    assert len(Shards(tmp_path / "a", pyarrow.float64())) == 0


@pytest.mark.parametrize("odd", [None, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_no_number_is_set_aside_and_counted(tmp_path, odd):
    class Odd(Lengths):
        def score(self, pairs):
            scores = super().score(pairs)
            return [odd if score == "odd" else score for score in scores]

    teachers = {"good": Lengths(), "bad": Odd(odd={"d1": "odd", "d6": "odd"})}
    assert score_pairs(teachers, PAIRS, tmp_path) == {"good": 0, "bad": 2}
    assert len(Shards(tmp_path / "bad", pyarrow.float64())) == 7
    left_out = Counter()
    rows = rows_in(tmp_path, teachers, left_out)
    assert [[each["text"] for each in row["documents"]] for row in rows] == [
        ["text 0", "text 2"],
        ["text 3", "text 4"],
        ["text 5", "text 7", "text 8"],
    ]
    assert left_out == {"document without score": 2}
    # Without its source, a row has no positive.
    assert [row["positive"] for row in rows] == [None, 0, 2]
    # Asked again by the next run, and nothing else is.
    mended = Lengths()
    score_pairs({"bad": mended}, PAIRS, tmp_path)
    assert mended.asked == [("first", "d1"), ("third", "d6")]


@pytest.mark.parametrize("kind", [int, np.float32, np.float64])
def test_numbers_of_any_kind(tmp_path, kind):
    score_pairs({"a": Lengths(odd={"d0": kind(3)})}, PAIRS[:2], tmp_path)
    assert Shards(tmp_path / "a", pyarrow.float64())[pair_key(Lengths(), PAIRS[0])] == 3.0


def test_rows(tmp_path):
    teachers = {"a": Lengths(), "b": Lengths("b", odd={"d1": -4.0})}
    score_pairs(teachers, PAIRS, tmp_path)
    left_out = Counter()
    rows = rows_in(tmp_path, teachers, left_out)
    assert rows[0] == {
        "query": "first",
        "documents": [{"title": "", "text": f"text {n}"} for n in range(3)],
        "scores": {"a": [5.0, 5.1, 5.2], "b": [5.0, -4.0, 5.2]},
        "source": "q0",
        "positive": 1,
    }
    assert [row["positive"] for row in rows] == [1, 0, 3]
    assert left_out == {}


def test_the_student_does_not_read_what_the_query_copied(tmp_path):
    documents = {
        name: {"_id": name, "title": name, "text": f"There is a {name} in a wood. Both say this."}
        for name in ("fox", "hen")
    }
    queries = {f"q{n}": "Both say this." for n in range(200)}
    candidates = [{"query": query, "source": "fox", "documents": ["hen", "fox"]} for query in queries]
    teacher = Constant()
    score_pairs({"a": teacher}, pairs_of(candidates, queries, documents), tmp_path)

    def masked(share, seed=0):
        rows = rows_of(candidates, queries, documents, {"a": teacher}, tmp_path, Counter(), share, seed)
        return [[each["text"] for each in row["documents"]] for row in rows]

    whole = [f"There is a {name} in a wood. Both say this." for name in ("hen", "fox")]
    without = [whole[0], "There is a fox in a wood."]
    assert masked(0.0) == [whole] * 200
    assert masked(1.0) == [without] * 200
    some = masked(0.9)
    assert some.count(without) in range(160, 200)
    assert some.count(whole) == 200 - some.count(without)
    assert masked(0.9) == some != masked(0.9, seed=1)


def test_a_query_with_one_scored_document_is_left_out(tmp_path):
    teachers = {"a": Lengths(odd={"d3": math.nan})}
    score_pairs(teachers, PAIRS, tmp_path)
    left_out = Counter()
    assert [row["source"] for row in rows_in(tmp_path, teachers, left_out)] == ["q0", "q2"]
    assert left_out == {"document without score": 1, "query with fewer than two documents": 1}


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_all_pairs(tmp_path, processes):
    alone = {"a": Lengths()}
    score_pairs(alone, PAIRS, tmp_path / "alone")
    teachers = [Lengths() for _ in range(processes)]
    for number, teacher in enumerate(teachers):
        # Each with a folder of its own: none sees what another has done.
        score_pairs({"a": teacher}, PAIRS, tmp_path / str(number), process=number, processes=processes)
    assert sorted(each for teacher in teachers for each in teacher.asked) == sorted(alone["a"].asked)
    together = tmp_path / "together" / "a"
    together.mkdir(parents=True)
    for path in [*tmp_path.glob("[0-9]/a/*.parquet")]:
        path.rename(together / path.name)
    assert rows_in(tmp_path / "together", alone) == rows_in(tmp_path / "alone", alone)
    assert len(rows_in(tmp_path / "alone", alone)) == 3


def test_progress_is_told(tmp_path):
    told = []
    score_pairs({"a": Lengths(batch_size=4)}, PAIRS, tmp_path, advance=told.append)
    score_pairs({"a": Lengths(batch_size=4)}, PAIRS, tmp_path, advance=told.append)
    assert told == [4, 4, 1] * 2
