"""A node postprocessor for LlamaIndex."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from ..checkpoints.loading import load_model


class QueritRerank(BaseNodePostprocessor):
    """Keeps the nodes that are most relevant to a query, best first, with the reranker's scores.

    A node's text is what its embedding is made from: its content, with the metadata that are not excluded.

    Args:
        model: "mini", or a folder or repository.
        top_n: Number of nodes to keep; None for all.
        instruction: The task in one sentence; by default the one that the model was trained with.
        device: Device to compute on; the CPU by default.

    Example:
        ```python
        >>> index.as_query_engine(similarity_top_k=50, node_postprocessors=[QueritRerank(model="mini", top_n=5)])
        ```
    """

    model: str = "mini"
    top_n: int | None = 3
    instruction: str | None = None
    device: str | None = None
    _reranker: Any = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Load the model."""
        super().model_post_init(context)
        self._reranker = load_model(self.model, device=self.device)

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in saved settings."""
        return "QueritRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("There is no query to rerank for: give query_str or query_bundle.")
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        query = query_bundle.query_str
        ranking = self._reranker.rank(query, texts, self.instruction, self.top_n, show_progress_bar=False)
        return [NodeWithScore(node=nodes[ranked.index].node, score=ranked.score) for ranked in ranking]
