"""Batches of whole queries, as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..engine_querit import inputs_of
from ..packing_querit import plan_packs
from ..processing_querit import QueritProcessor
from .rows import Row


class RankingCollator:
    """Flattens rows into one batch of pairs: every document of a query stays in its batch.

    Args:
        processor: Of the model that is trained.
        max_length: Tokens a pair may have; the processor's own by default.
        packing: Whether the pairs lie end to end in one row.
        share_prefix: Of packs: whether what the pairs of a query begin with lies there once.

    Returns (when called): what the model takes, and `labels`, (pairs,), float32, and `query_ids`, (pairs,): the row a
    pair came from. The model takes `input_ids` and `attention_mask`, (pairs, sequence), padded on the left; or packed,
    `input_ids` and `position_ids`, (1, tokens), and the `pack` that describes them.

    Example:
        ```python
        >>> collator = RankingCollator(model.processor)
        >>> collator([{"query": "a", "documents": ["b", "c"], "labels": [1, 0]}])["query_ids"]
        tensor([0, 0])
        ```
    """

    def __init__(
        self,
        processor: QueritProcessor,
        max_length: int | None = None,
        packing: bool = False,
        share_prefix: bool = True,
    ):
        self.processor = processor
        self.max_length = max_length
        self.packing = packing
        self.share_prefix = share_prefix

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One batch of all pairs of the rows."""
        labels = [label for row in rows for label in self._checked_labels(row)]
        query_ids = [index for index, row in enumerate(rows) for _ in row["documents"]]
        queries = [rows[index]["query"] for index in query_ids]
        documents = [document for row in rows for document in row["documents"]]
        instructions = [rows[index].get("instruction") for index in query_ids]
        encoded = self.processor.encode(queries, documents, instructions, self.max_length)
        input_ids = [each.input_ids for each in encoded]
        return self._laid_out(input_ids, query_ids) | {
            "labels": torch.tensor(labels, dtype=torch.float32),
            "query_ids": torch.tensor(query_ids),
        }

    def _checked_labels(self, row: Row) -> Sequence[float]:
        labels = self.labels_of(row)
        if len(labels) != len(row["documents"]):
            raise ValueError(f"{len(row['documents'])} documents and {len(labels)} labels: query {row['query']!r}.")
        return labels

    def labels_of(self, row: Row) -> Sequence[float]:
        """The labels of a row's documents."""
        return row["labels"]

    def _laid_out(self, input_ids: list[list[int]], query_ids: list[int]) -> dict[str, Any]:
        if not self.packing:
            return dict(self.processor.pad(input_ids))
        groups = [[] for _ in range(query_ids[-1] + 1)]
        for pair, query_id in enumerate(query_ids):
            groups[query_id].append(pair)
        tokens = sum(map(len, input_ids))
        (pack,) = plan_packs(input_ids, groups, tokens, self.share_prefix)
        return inputs_of(pack) | {"pack": pack}
