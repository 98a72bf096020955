import json

import numpy as np
import pytest

from modeling_querit.files import write_jsonl
from modeling_querit.training.dataset import RankingDataset
from modeling_querit.training.reading import read_rows
from modeling_querit.training.rows import check_row

ROWS = [
    {"query": "who wrote it", "documents": ["lee", {"title": "A", "text": "book"}], "labels": [1, 0.5]},
    {"query": "the book", "documents": ["x"], "labels": [0], "instruction": "Find the book."},
]


def test_rows_round_trip(tmp_path):
    write_jsonl(ROWS, tmp_path / "new" / "rows.jsonl")
    assert list(read_rows(tmp_path / "new" / "rows.jsonl")) == ROWS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]
    dataset = RankingDataset.from_jsonl(tmp_path / "new" / "rows.jsonl")
    assert len(dataset) == 2
    assert dataset[1] == ROWS[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2: no 'query'"),
        (json.dumps({"query": "a", "documents": ["b"]}), "line 2: no 'labels'"),
        (json.dumps({"query": 1, "documents": ["b"], "labels": [1]}), "line 2: the query"),
        (json.dumps({"query": "a", "documents": "b", "labels": [1]}), "line 2: documents is a list"),
        (json.dumps({"query": "a", "documents": ["b"], "labels": [1, 0]}), "line 2: labels: 1 documents and 2 labels"),
        (json.dumps({"query": "a", "documents": [], "labels": []}), "line 2: documents is a list, of at least one"),
        (json.dumps({"query": "a", "documents": [{"title": "b"}], "labels": [1]}), "line 2: a document"),
        (json.dumps({"query": "a", "documents": ["b"], "labels": ["1"]}), "line 2: labels: label '1'"),
        (json.dumps({"query": "a", "documents": [{"text": "b", "title": 4}], "labels": [1]}), "line 2: the title is 4"),
        (
            json.dumps({"query": "a", "documents": ["b"], "labels": [1], "instruction": 7}),
            "line 2: the instruction is 7",
        ),
        ("\udcff", "line 2: "),
        (json.dumps({"query": "a", "documents": ["b"], "labels": [float("nan")]}), "line 2: labels: label nan"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + row + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n")
    assert list(read_rows(path)) == ROWS[:1]


def test_rows_may_have_teacher_scores_for_labels():
    check_row({"query": "a", "documents": ["b", "c"], "scores": {"x": [1.5, None], "y": None}}, "here")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1, 2], r"here: scores is \[1, 2\]"),
        ({"x": [1.0]}, "here: scores of 'x': 2 documents and 1 scores"),
        ({"x": [1.0, "2"]}, "here: scores of 'x': score '2'"),
        ({"x": [1.0, float("inf")]}, "here: scores of 'x': score inf"),
        ({"x": 3}, "here: scores of 'x' are 3"),
    ],
)
def test_broken_teacher_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        check_row({"query": "a", "documents": ["b", "c"], "scores": scores}, "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "bad \ud800", "documents": ["b"], "labels": [1]}, "the query: half of a character at place 4"),
        ({"query": "a", "documents": [{"text": "\udfff"}], "labels": [1]}, "a document: half of a character"),
        ({"query": "a", "documents": ["b"], "labels": [10**400]}, "label 1000.* is not a finite number"),
        ({"query": "a", "documents": ["b"], "scores": {}}, "no 'labels'"),
        ({"query": "a", "documents": ["b"], "scores": {"a": None, "b": None}}, "no 'labels'"),
    ],
)
def test_rows_that_could_not_be_trained_on(row, message):
    with pytest.raises(ValueError, match=message):
        check_row(row, "here")


def test_numbers_of_numpy_are_numbers():
    check_row({"query": "a", "documents": ["b", "c"], "labels": [np.float32(1), np.int64(0)]}, "here")
