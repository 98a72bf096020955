"""The form of a row, and the dataset of rows made by hand."""

import json

import numpy as np
import pytest

from modeling_querit.files import write_jsonl
from modeling_querit.training.data import RankingDataset, check_row, is_collection, read_rows, row_length

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
        (json.dumps({"query": "a", "documents": "b", "labels": [1]}), "line 2: documents is not a list"),
        (json.dumps({"query": "a", "documents": ["b"], "labels": [1, 0]}), "line 2: labels: 1 documents and 2 labels"),
        (
            json.dumps({"query": "a", "documents": [], "labels": []}),
            "line 2: documents is not a list of at least one",
        ),
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
def test_a_broken_row_is_named_by_file_and_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + row + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n")
    assert list(read_rows(path)) == ROWS[:1]


def test_rows_may_have_scores_in_place_of_labels():
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
        ({"query": "bad \ud800", "documents": ["b"], "labels": [1]}, "the query: a lone surrogate at character 4"),
        ({"query": "a", "documents": [{"text": "\udfff"}], "labels": [1]}, "a document: a lone surrogate"),
        ({"query": "a", "documents": ["b"], "labels": [10**400]}, "label 1000.* is not a finite number"),
        ({"query": "a", "documents": ["b"], "scores": {}}, "no 'labels'"),
        ({"query": "a", "documents": ["b"], "scores": {"a": None, "b": None}}, "no 'labels'"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        check_row(row, "here")


def test_numpy_numbers_are_numbers():
    check_row({"query": "a", "documents": ["b", "c"], "labels": [np.float32(1), np.int64(0)]}, "here")


def test_a_dataset_checks_rows_made_by_hand():
    with pytest.raises(ValueError, match="row 1: no 'documents'"):
        RankingDataset([ROWS[0], {"query": "a"}])


def test_the_length_of_a_row_counts_the_query_with_each_document():
    assert row_length({"query": "abc", "documents": ["12345", {"title": "no", "text": "67"}], "labels": [1, 0]}) == 13


def test_a_collection_is_a_folder_with_or_without_a_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    sources = [str(tmp_path), f"{tmp_path}:dev", str(tmp_path / "rows.jsonl"), "owner/dataset:train"]
    assert [is_collection(source) for source in sources] == [True, True, False, False]
