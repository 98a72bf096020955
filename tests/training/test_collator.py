"""Batches of whole queries."""

import pytest
import torch

from modeling_querit.training.collator import RankingCollator

ROWS = [
    {"query": "who wrote it", "documents": ["lee", {"title": "A", "text": "book"}], "labels": [1, 0.5]},
    {"query": "the book", "documents": ["x"], "labels": [0], "instruction": "Find the book."},
]


def test_whole_queries_become_pairs(processor):
    batch = RankingCollator(processor)(ROWS)
    assert batch["labels"].tolist() == [1, 0.5, 0]
    assert batch["labels"].dtype == torch.float32
    assert batch["query_ids"].tolist() == [0, 0, 1]
    alone = processor.encode(["the book"], ["x"], "Find the book.")[0].input_ids
    assert batch["input_ids"][2][batch["attention_mask"][2].bool()].tolist() == alone
    assert set(batch["input_ids"][:, -1].tolist()) == {processor.cls_token_id}


def test_pairs_are_truncated_to_the_length_of_the_collator(processor):
    shortest = len(processor.encode(["who wrote it"], [""])[0].input_ids)
    rows = [{"query": "who wrote it", "documents": ["book " * 500], "labels": [1]}]
    assert RankingCollator(processor, max_length=shortest + 5)(rows)["input_ids"].shape[1] == shortest + 5


def test_a_row_without_labels_is_named(processor):
    with pytest.raises(ValueError, match="No labels for query 'a': train on scores"):
        RankingCollator(processor)([{"query": "a", "documents": ["x"], "scores": {"t": [1]}}])


def test_documents_and_labels_have_to_match(processor):
    rows = [
        {"query": "a", "documents": ["x", "y"], "labels": [1]},
        {"query": "b", "documents": ["u"], "labels": [0, 1]},
    ]
    with pytest.raises(ValueError, match="shorter"):
        RankingCollator(processor)(rows)
