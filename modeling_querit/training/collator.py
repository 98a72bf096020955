"""Collation of rows: whole queries become one batch of pairs, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..packing_querit import plan_packs
from ..pair_encoding_querit import DEFAULT_INSTRUCTION
from ..processing_querit import QueritProcessor
from .data import Row


class RankingCollator:
    """Turns rows into one batch of all their pairs; the documents of a query are never split over batches.

    Args:
        processor: Processor of the model that is trained.
        max_length: Maximum number of tokens per pair, `[CLS]` included; the processor's own limit by default.
        packing: Whether the pairs are packed into one sequence instead of padded.
        share_prefix: Whether a pack holds the shared prefix of a query's pairs once.

    Calling it returns what the model takes, and `labels`, (pairs,), float32, and `query_ids`, (pairs,), the index of
    the row that a pair belongs to. Padded, the model takes `input_ids` and `attention_mask`, (pairs, sequence), padded
    on the left; packed, `input_ids` and `position_ids`, (1, tokens), and the `pack` that describes them.

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
        """Make one batch of all pairs of the rows, which `check_row` has passed."""
        pairs = [
            (index, document, label)
            for index, row in enumerate(rows)
            for document, label in zip(row["documents"], self.labels_of(row), strict=True)
        ]
        query_ids = [index for index, _, _ in pairs]
        queries = [rows[index]["query"] for index in query_ids]
        instructions = [_instruction_of(rows[index]) for index in query_ids]
        encoded = self.processor.encode(queries, [document for _, document, _ in pairs], instructions, self.max_length)
        input_ids = [pair.input_ids for pair in encoded]
        model_inputs = self._pack(input_ids, query_ids) if self.packing else dict(self.processor.pad(input_ids))
        return model_inputs | {
            "labels": torch.tensor([label for _, _, label in pairs], dtype=torch.float32),
            "query_ids": torch.tensor(query_ids),
        }

    def labels_of(self, row: Row) -> Sequence[float]:
        """Return the labels of a row's documents, one each.

        Raises:
            ValueError: if the row has none.
        """
        labels = row.get("labels")
        if labels is None:
            raise ValueError(f"No labels for query {row['query']!r}: train on scores with QueritDistillationTrainer.")
        return labels

    def _pack(self, input_ids: list[list[int]], query_ids: list[int]) -> dict[str, Any]:
        """Put all pairs into a single pack, however many tokens they are."""
        groups: list[list[int]] = [[] for _ in range(query_ids[-1] + 1)]
        for pair, query_id in enumerate(query_ids):
            groups[query_id].append(pair)
        token_count = sum(map(len, input_ids))
        (pack,) = plan_packs(input_ids, groups, token_count, self.share_prefix)
        return pack.to_tensors() | {"pack": pack}


def _instruction_of(row: Row) -> str:
    instruction = row.get("instruction")
    return DEFAULT_INSTRUCTION if instruction is None else instruction
