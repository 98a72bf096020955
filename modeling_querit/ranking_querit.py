"""Ranking: from (query, document) texts to scores, and to documents in order of relevance."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from .arguments_querit import check_count, describe
from .calibration_querit import probability_of
from .documents_querit import document_content, document_id
from .multi_process_querit import ProcessPool, check_devices, plan_chunks
from .offloading_querit import execution_device
from .pair_encoding_querit import EncodedPair, Pair
from .prompt_learning_querit import check_no_prompt
from .scoring_querit import ALL, Optimizations, Progress, Window, default_batch_tokens

if TYPE_CHECKING:
    from .modeling_querit import QueritForSequenceRanking

logger = logging.get_logger(__name__)

# Seconds before a progress bar shows: quick calls stay quiet.
_PROGRESS_DELAY = 2.0
# Number of pairs that are tokenized together.
_TOKENIZED_TOGETHER = 256
# Number of forward passes that are planned together, which bounds how much of the input is held in memory.
_PASSES_PER_WINDOW = 16
# Number of pairs for each process that are shared out together.
_PAIRS_PER_PROCESS = 256


class RankedDocument(NamedTuple):
    """A document as it was given, its relevance score in [-1, 1] and its index in the list that was ranked."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    score: float
    document: Any

    @property
    def id(self) -> Any:
        """The document's own id; None if it has none."""
        return document_id(self.document)


@dataclass(frozen=True)
class _Settings:
    """How pairs are scored, whichever process does it; see `score_stream`."""

    instruction: str | None
    max_length: int | None
    batch_tokens: int | None
    optimizations: Optimizations


def rank_documents(
    model: QueritForSequenceRanking,
    query: str,
    documents: Iterable[Any],
    *,
    top_k: int | None = None,
    as_probability: bool = False,
    **kwargs: Any,
) -> list[RankedDocument]:
    """Score documents and sort them; see `QueritForSequenceRanking.rank`, whose arguments these are."""
    if not isinstance(query, str):
        raise TypeError(f"query is {describe(query)}: give one string.")
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(f"documents is {describe(documents)}: give a list of documents.")
    if hasattr(documents, "columns"):
        # A table of pandas is an iterable of the names of its columns.
        raise TypeError(f"documents is a table ({type(documents).__name__}): give a list of its texts, or of its rows.")
    top_k = check_count("top_k", top_k)
    probability = probability_of(model.config) if as_probability else None
    total = len(documents) if isinstance(documents, Sized) else None
    scored = score_stream(model, ((query, document) for document in documents), total=total, **kwargs)
    ranked = (RankedDocument(index, score, document) for index, ((_, document), score) in enumerate(scored))
    if top_k is None:
        # sorted() is stable, so documents of equal score keep their order.
        best = sorted(ranked, key=lambda document: -document.score)
    else:
        # No more than top_k documents are held, however many there are.
        best = heapq.nsmallest(top_k, ranked, key=lambda document: (-document.score, document.index))
    return [document._replace(score=probability(document.score)) for document in best] if probability else best


async def rank_documents_in_thread(
    model: QueritForSequenceRanking, query: str, documents: Iterable[Any], **kwargs: Any
) -> list[RankedDocument]:
    """Rank in a thread, as `rank_documents` does; the thread stops after its forward pass if the task is cancelled."""
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(rank_documents, model, query, documents, cancelled=cancelled, **kwargs)
    finally:
        cancelled.set()


def score_stream(
    model: QueritForSequenceRanking,
    pairs: Iterable[Pair],
    *,
    instruction: str | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    device: Sequence[str | torch.device] | None = None,
    pool: ProcessPool | None = None,
    total: int | None = None,
    cancelled: threading.Event | None = None,
    optimizations: Optimizations = ALL,
) -> Iterator[tuple[Pair, float]]:
    """Yield each pair with its score, in order, while `pairs` is read: memory does not grow with its length.

    The arguments after `pairs` are those of `QueritForSequenceRanking.predict`.

    Args:
        model: The reranker.
        pairs: (query, document) pairs.
        instruction: The task in one sentence, the same for all pairs.
        max_length: Maximum number of tokens in a pair.
        batch_tokens: Maximum number of tokens in a forward pass.
        show_progress_bar: Whether to show a progress bar.
        device: Device of each process that shall share the work, started for this call.
        pool: Processes that are running already, from `start_multi_process_pool`.
        total: Number of pairs for the progress bar, if `pairs` has no length.
        cancelled: Event that is set, by another thread, when the scoring shall stop.
        optimizations: Enabled speed optimizations.

    Raises:
        TypeError: if an argument has another type, a pair is not a 2-tuple, or a document has no text.
        ValueError: if a number is below 1, the model has no weights, the pool is not this model's as it is now, or a
            score is NaN or infinite.
        RuntimeError: if a process was killed, or cannot use its device.
    """
    if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is {describe(pairs)}: give (query, document) tuples.")
    if not isinstance(instruction, str | None):
        raise TypeError(f"instruction is {describe(instruction)}: give one string, for all pairs.")
    if not isinstance(show_progress_bar, bool | None):
        raise TypeError(f"show_progress_bar is {describe(show_progress_bar)}: give True or False.")
    check_no_prompt(model, "ranking")
    settings = _Settings(
        instruction, check_count("max_length", max_length), check_count("batch_tokens", batch_tokens), optimizations
    )
    if execution_device(model).type == "meta":
        raise ValueError("The model's weights are on the meta device, so it has none: load it on another device.")
    processes = _processes(model, device, pool)

    def scored() -> Iterator[tuple[Pair, float]]:
        index = 0
        with processes() as workers, _progress_bar(pairs, total, show_progress_bar) as bar:
            progress = Progress(bar, cancelled)
            windows = (
                _score_windows(model, pairs, settings, progress)
                if workers is None
                else _score_in_processes(workers, pairs, settings, progress)
            )
            for pairs_of_window, scores in windows:
                _check_finite(scores, pairs_of_window, index)
                index += len(pairs_of_window)
                yield from zip(pairs_of_window, scores.tolist(), strict=True)

    return scored()


def _processes(
    model: QueritForSequenceRanking, device: Sequence[str | torch.device] | None, pool: ProcessPool | None
) -> Callable[[], AbstractContextManager[ProcessPool | None]]:
    """Return what enters the processes that score: a given pool, one that is started then, or none."""
    if device is not None and pool is not None:
        raise ValueError("device starts processes, and pool is some that run already: give one of them.")
    if device is not None:
        devices = check_devices(device)
        return lambda: start_pool(model, devices)
    if pool is not None:
        pool.check_model(model)
    return lambda: nullcontext(pool)


def start_pool(model: QueritForSequenceRanking, devices: Sequence[str | torch.device]) -> ProcessPool:
    """Start processes that score pairs; see `QueritForSequenceRanking.start_multi_process_pool`."""
    check_no_prompt(model, "ranking")
    return ProcessPool(model, devices, _score_chunk)


def _score_in_processes(
    pool: ProcessPool, pairs: Iterable[Pair], settings: _Settings, progress: Progress
) -> Iterator[tuple[list[Pair], Tensor]]:
    """Yield windows of pairs with their scores, (pairs,) in float32, from the processes of a pool."""
    checked_pairs = map(_checked, pairs, itertools.count())
    while window := list(itertools.islice(checked_pairs, _PAIRS_PER_PROCESS * len(pool))):
        contents = [content for _, content in window]
        lengths = [len(document if isinstance(document, str) else document["text"]) for _, document in contents]
        chunks = plan_chunks([query for query, _ in contents], lengths, len(pool))
        calls = [([contents[pair] for pair in chunk], settings) for chunk in chunks]
        results = pool.run(calls, [partial(progress.update, len(chunk)) for chunk in chunks])
        scores = torch.empty(len(window))
        for chunk, chunk_scores in zip(chunks, results, strict=True):
            scores[chunk] = torch.tensor(chunk_scores)
        yield [pair for pair, _ in window], scores


def _score_chunk(model: QueritForSequenceRanking, pairs: Sequence[Pair], settings: _Settings) -> list[float]:
    """Score pairs in a worker process; the scores are checked where their indices are known."""
    windows = _score_windows(model, pairs, settings, Progress(logging.EmptyTqdm()))
    return [score for _, scores in windows for score in scores.tolist()]


def _score_windows(
    model: QueritForSequenceRanking, pairs: Iterable[Pair], settings: _Settings, progress: Progress
) -> Iterator[tuple[list[Pair], Tensor]]:
    """Yield windows of pairs with their scores, (pairs,) in float32."""
    batch_tokens = settings.batch_tokens or default_batch_tokens(model)
    for pairs_of_window, encoded in _windows(model, pairs, settings, batch_tokens * _PASSES_PER_WINDOW):
        window = Window(model, pairs_of_window, encoded, batch_tokens, settings.optimizations)
        yield pairs_of_window, window.score(progress)
        # A batch size that ran out of memory once is not tried again.
        batch_tokens = window.batch_tokens


def _progress_bar(pairs: Iterable[Pair], total: int | None, show: bool | None) -> Any:
    if not (sys.stderr and sys.stderr.isatty() if show is None else show):
        # Not a disabled bar: it takes tqdm's lock, which a process forked in that moment waits for forever.
        return logging.EmptyTqdm()
    return logging.tqdm(
        total=len(pairs) if isinstance(pairs, Sized) else total,
        desc="Scoring",
        unit="pair",
        delay=0 if show else _PROGRESS_DELAY,
    )


def _windows(
    model: QueritForSequenceRanking, pairs: Iterable[Pair], settings: _Settings, tokens: int
) -> Iterator[tuple[list[Pair], list[EncodedPair]]]:
    """Yield pairs and their token ids, in windows of about `tokens` tokens."""
    checked_pairs = map(_checked, pairs, itertools.count())
    window: tuple[list[Pair], list[EncodedPair]] = [], []
    size = 0
    while chunk := list(itertools.islice(checked_pairs, _TOKENIZED_TOGETHER)):
        queries, documents = zip(*(content for _, content in chunk), strict=True)
        encoded = model.processor.encode(queries, documents, settings.instruction, settings.max_length)
        _warn_about_cuts(encoded)
        window[0].extend(pair for pair, _ in chunk)
        window[1].extend(encoded)
        size += sum(len(pair.input_ids) for pair in encoded)
        if size >= tokens:
            yield window
            window, size = ([], []), 0
    if window[0]:
        yield window


def _checked(pair: Pair, index: int) -> tuple[Pair, Pair]:
    """Return a pair as it was given, and the query with what of the document is scored."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"Pair {index} is {describe(pair)}: give (query, document) tuples.")
    query, document = pair
    if not isinstance(query, str):
        raise TypeError(f"The query of pair {index} is {describe(query)}: give a string.")
    return pair, (query, document_content(document, index))


def _warn_about_cuts(encoded: Sequence[EncodedPair]) -> None:
    if any(pair.cut_content or pair.cut_query for pair in encoded):
        logger.warning_once(
            "Some pairs are longer than max_length: the end of their document, or of their query, is cut; "
            "model.processor.encode reports which, and by how many tokens."
        )


def _check_finite(scores: Tensor, pairs: Sequence[Pair], first: int) -> None:
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        value, (_, document) = scores[bad[0]].item(), pairs[bad[0]]
        identifier = document_id(document)
        name = "" if identifier is None else f" (id {describe(identifier)})"
        kind = "NaN" if math.isnan(value) else "infinite"
        raise ValueError(
            f"The score of document {first + bad[0]}{name} is {kind} ({len(bad)} of {len(scores)} are): float16 "
            "activations can overflow, so load the model in bfloat16 or float32. If that does not help, the weights "
            "are damaged."
        )
