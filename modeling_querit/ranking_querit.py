"""The ranking engine: from (query, document) texts to scores, and to documents in order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers.utils import logging

from .processing_querit import Document, EncodedPair

if TYPE_CHECKING:
    from .modeling_querit import QueritForSequenceRanking

logger = logging.get_logger(__name__)

# Seconds before a progress bar shows: quick calls stay quiet.
_PROGRESS_DELAY = 2.0


class RankedDocument(NamedTuple):
    """A document with its relevance score in [-1, 1] and its index in the list that was ranked."""

    index: int
    score: float
    document: Document


def rank_documents(
    model: QueritForSequenceRanking,
    query: str,
    documents: Iterable[Document],
    *,
    top_k: int | None = None,
    **kwargs,
) -> list[RankedDocument]:
    """Score and sort; see `QueritForSequenceRanking.rank`, whose arguments these are."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: ask for at least one document, or leave it out for all.")
    if isinstance(documents, str | dict):
        raise TypeError("documents is one document: give a list of documents.")
    documents = list(documents)
    scores = score_pairs(model, [(query, document) for document in documents], **kwargs).tolist()
    # sorted() is stable, so documents of equal score keep their order.
    order = sorted(range(len(documents)), key=lambda index: -scores[index])[:top_k]
    return [RankedDocument(index, scores[index], documents[index]) for index in order]


def score_pairs(
    model: QueritForSequenceRanking,
    pairs: Sequence[tuple[str, Document]],
    *,
    instruction: str | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    show_progress_bar: bool | None = None,
) -> torch.Tensor:
    """Scores of pairs, float32 on the CPU, in the pairs' order; see `QueritForSequenceRanking.predict`."""
    pairs = list(pairs)
    queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
    encoded = model.processor.encode(queries, documents, instruction, max_length)
    _warn_about_cuts(encoded)
    lengths = [len(pair.input_ids) for pair in encoded]
    scores = torch.empty(len(pairs), dtype=torch.float32)
    progress = logging.tqdm(
        total=len(pairs),
        desc="Scoring",
        unit="pair",
        delay=0 if show_progress_bar else _PROGRESS_DELAY,
        disable=None if show_progress_bar is None else not show_progress_bar,
    )
    with progress, _evaluating(model), torch.inference_mode():
        for batch in plan_batches(lengths, batch_tokens):
            inputs = model.processor.pad([encoded[index].input_ids for index in batch]).to(model.device)
            output = model(**inputs)
            scores[batch] = output.score.squeeze(-1).float().cpu()
            progress.update(len(batch))
    _check_finite(scores)
    return scores


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of `lengths`, longest first, in batches of at most `batch_tokens` tokens with their padding.

    The longest come first, so that running out of memory happens at once. A single text over the budget is a
    batch by itself.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}: a batch needs at least one token.")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off for a while, and back to what it was."""
    # Module by module: parts that the caller froze in evaluation mode stay there.
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training:
            module.training = mode


def _warn_about_cuts(encoded: Sequence[EncodedPair]) -> None:
    if any(pair.cut_content or pair.cut_query for pair in encoded):
        logger.warning_once(
            "Some pairs are longer than max_length: the end of their document, or of their query, is not read; "
            "model.processor.encode tells which, and how many tokens."
        )


def _check_finite(scores: torch.Tensor) -> None:
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        value = scores[bad[0]].item()
        kind = "NaN" if math.isnan(value) else "infinite"
        raise ValueError(
            f"The score of document {bad[0]} is {kind} ({len(bad)} of {len(scores)} are): in float16 the activations "
            "can overflow, load the model in bfloat16 or float32; otherwise its weights are damaged."
        )
