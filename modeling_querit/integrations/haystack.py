"""A ranker for Haystack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document, component

from ..checkpoints.loading import load_model


@component
class QueritRanker:
    """Keeps the documents that are most relevant to a query, best first, with the reranker's scores in [-1, 1].

    Args:
        model: "mini", or a folder or repository.
        top_k: Number of documents to keep; None for all.
        instruction: The task in one sentence; by default the one that the model was trained with.
        device: Device to compute on; the CPU by default.

    Example:
        ```python
        >>> pipeline.add_component("ranker", QueritRanker(model="mini", top_k=5))
        >>> pipeline.connect("retriever.documents", "ranker.documents")
        ```
    """

    def __init__(
        self,
        model: str = "mini",
        top_k: int | None = 10,
        instruction: str | None = None,
        device: str | None = None,
    ):
        self.model, self.top_k, self.instruction, self.device = model, top_k, instruction, device
        self._reranker: Any = None

    def warm_up(self) -> None:
        """Load the model, once."""
        if self._reranker is None:
            self._reranker = load_model(self.model, device=self.device)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rank documents by their `content`; the given documents are not changed."""
        self.warm_up()
        texts = [document.content or "" for document in documents]
        ranking = self._reranker.rank(
            query, texts, self.instruction, self.top_k if top_k is None else top_k, show_progress_bar=False
        )
        return {"documents": [replace(documents[ranked.index], score=ranked.score) for ranked in ranking]}
