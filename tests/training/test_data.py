import json

import pytest
import torch

from modeling_querit.training.data import RankingCollator, RankingDataset, read_rows, write_rows

ROWS = [
    {"query": "who wrote it", "documents": ["lee", {"title": "A", "text": "book"}], "labels": [1, 0.5]},
    {"query": "the book", "documents": ["x"], "labels": [0], "instruction": "Find the book."},
]


def test_rows_round_trip(tmp_path):
    write_rows(ROWS, tmp_path / "new" / "rows.jsonl")
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
        (json.dumps({"query": "a", "documents": "b", "labels": [1]}), "line 2: documents and labels are lists"),
        (json.dumps({"query": "a", "documents": ["b"], "labels": [1, 0]}), "line 2: 1 documents and 2 labels"),
        (json.dumps({"query": "a", "documents": [], "labels": []}), "line 2: 0 documents"),
        (json.dumps({"query": "a", "documents": [{"title": "b"}], "labels": [1]}), "line 2: a document"),
        (json.dumps({"query": "a", "documents": ["b"], "labels": ["1"]}), "line 2: label '1'"),
        (json.dumps({"query": "a", "documents": [{"text": "b", "title": 4}], "labels": [1]}), "line 2: the title is 4"),
        (
            json.dumps({"query": "a", "documents": ["b"], "labels": [1], "instruction": 7}),
            "line 2: the instruction is 7",
        ),
        ("\udcff", "line 2: "),
        (json.dumps({"query": "a", "documents": ["b"], "labels": [float("nan")]}), "line 2: label nan"),
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


def test_the_collator_flattens_whole_queries(processor):
    batch = RankingCollator(processor)(ROWS)
    assert batch["labels"].tolist() == [1, 0.5, 0]
    assert batch["labels"].dtype == torch.float32
    assert batch["query_ids"].tolist() == [0, 0, 1]
    alone = processor.encode(["the book"], ["x"], "Find the book.")[0].input_ids
    assert batch["input_ids"][2][batch["attention_mask"][2].bool()].tolist() == alone
    assert set(batch["input_ids"][:, -1].tolist()) == {processor.cls_token_id}


def test_the_collator_cuts_at_its_own_length(processor):
    shortest = len(processor.encode(["who wrote it"], [""])[0].input_ids)
    rows = [{"query": "who wrote it", "documents": ["book " * 500], "labels": [1]}]
    assert RankingCollator(processor, max_length=shortest + 5)(rows)["input_ids"].shape[1] == shortest + 5
