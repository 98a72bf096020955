"""A document compressor for LangChain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, PrivateAttr

from ..checkpoints.loading import load_model


class QueritReranker(BaseDocumentCompressor):
    """Keeps the documents that are most relevant to a query, best first, with `relevance_score` in their metadata.

    Args:
        model: "mini", or a folder or repository.
        top_n: Number of documents to keep; None for all.
        instruction: The task in one sentence; by default the one that the model was trained with.
        device: Device to compute on; the CPU by default.

    Example:
        ```python
        >>> retriever = ContextualCompressionRetriever(
        ...     base_compressor=QueritReranker(model="mini", top_n=3), base_retriever=vector_store.as_retriever()
        ... )
        ```
    """

    model: str = "mini"
    top_n: int | None = 3
    instruction: str | None = None
    device: str | None = None
    model_config = ConfigDict(extra="forbid")
    _reranker: Any = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Load the model."""
        self._reranker = load_model(self.model, device=self.device)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rank documents by their `page_content`; the given documents are not changed."""
        texts = [document.page_content for document in documents]
        ranking = self._reranker.rank(query, texts, self.instruction, self.top_n, show_progress_bar=False)
        return [
            documents[ranked.index].model_copy(
                update={"metadata": documents[ranked.index].metadata | {"relevance_score": ranked.score}}
            )
            for ranked in ranking
        ]
