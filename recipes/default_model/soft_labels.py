"""Soft labels of EmbeddingGemma, computed while a cross-encoder trains, so that training need not wait for `embed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

from .embed import query_text
from .fast_gemma import FastGemma

# Cosines are divided by it; the temperature that the encoder was trained with.
TEMPERATURE = 0.05


class SoftLabels:
    """The encoder, and how its similarities and human labels make soft labels.

    Args:
        weights: Folder of EmbeddingGemma, in the layout of sentence-transformers.
        backbone: Its backbone, a `Gemma3TextModel`, which the encoder shares its embeddings with.
        human: Nats that a human label of 1 adds.
    """

    def __init__(self, weights: Path, backbone: nn.Module, human: float):
        self._backbone = FastGemma(backbone, rank=1)
        self._dense = [
            load_file(weights / folder / "model.safetensors")["linear.weight"].float()
            for folder in ("2_Dense", "3_Dense")
        ]
        self._tokenizer = AutoTokenizer.from_pretrained(weights)
        self._human = human

    def __call__(self, query: str, documents: Sequence[dict], labels: Tensor, max_length: int) -> Tensor:
        """Log-odds of the documents up to a constant, (documents,), float32; `labels` are the human ones, in [0, 1]."""
        texts = [f"title: {document['title'] or 'none'} | text: {document['text']}" for document in documents]
        query_embedding, *embeddings = self.embed([query_text(query, "embeddinggemma"), *texts], max_length)
        return torch.stack(embeddings) @ query_embedding / TEMPERATURE + self._human * labels

    @torch.no_grad()
    def embed(self, texts: Sequence[str], max_length: int) -> Tensor:
        """Embeddings of unit length, (texts, dimensions), float32, of texts with their prompts."""
        ids = self._tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        states = self._backbone.normalize(self._backbone.states(ids))
        pooled = torch.stack([part.mean(0) for part in states.split([len(text) for text in ids])])
        for weight in self._dense:
            pooled = pooled @ weight.T
        return functional.normalize(pooled, dim=-1)
