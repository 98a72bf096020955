"""The ranking engine: from (query, document) texts to scores, and to documents in order."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.utils import logging

from .attention_querit import CannotPack, States
from .engine_querit import attends_plainly, exclusive, rotates_by_length, score_pack, score_padded
from .packing_querit import plan_packs
from .processing_querit import Document, EncodedPair

if TYPE_CHECKING:
    from .modeling_querit import QueritForSequenceRanking

logger = logging.get_logger(__name__)

# Seconds before a progress bar shows: quick calls stay quiet.
_PROGRESS_DELAY = 2.0
# Pairs that are tokenized together.
_PAIRS_AT_ONCE = 256
# Forward passes that are planned together: so much of the input is held in memory.
_PASSES_AT_ONCE = 16

Pair = tuple[str, Document]


class RankedDocument(NamedTuple):
    """A document with its relevance score in [-1, 1] and its index in the list that was ranked."""

    index: int
    score: float
    document: Document


@dataclass(frozen=True)
class Optimizations:
    """What the engine saves; none of it changes a score by more than rounding does.

    Args:
        packs: Pairs are laid end to end, so that padding is not computed with.
        share_prefix: What the pairs of a query begin with is computed once, its states serve them all. Needs `packs`.
        reads_last_only: The last layer computes nothing but keys and values for tokens nobody reads. Needs `packs`.
        converts: Arithmetic is as the processor is fastest: with states in float32 on CPUs without matrix units, and
            with int8 weights, states are quantized once for all layers that read them.
    """

    packs: bool = True
    share_prefix: bool = True
    reads_last_only: bool = True
    converts: bool = True


ALL = Optimizations()
# Models whose attention turned out to be more than packs can express, and those where weights meet float32 states
# otherwise than in a linear layer or a norm.
_unpackable: WeakSet[torch.nn.Module] = WeakSet()
_unconvertible: WeakSet[torch.nn.Module] = WeakSet()


def rank_documents(
    model: QueritForSequenceRanking,
    query: str,
    documents: Iterable[Document],
    *,
    top_k: int | None = None,
    **kwargs: Any,
) -> list[RankedDocument]:
    """Score and sort; see `QueritForSequenceRanking.rank`, whose arguments these are."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: ask for at least one document, or leave it out for all.")
    if isinstance(documents, str | dict):
        raise TypeError("documents is one document: give a list of documents.")
    total = len(documents) if isinstance(documents, Sized) else None
    scored = score_stream(model, ((query, document) for document in documents), total=total, **kwargs)
    ranked = (RankedDocument(index, score, document) for index, ((_, document), score) in enumerate(scored))
    if top_k is None:
        # sorted() is stable, so documents of equal score keep their order.
        return sorted(ranked, key=lambda one: -one.score)
    # Of any number of documents, no more than top_k are held.
    return heapq.nsmallest(top_k, ranked, key=lambda one: (-one.score, one.index))


def score_pairs(model: QueritForSequenceRanking, pairs: Iterable[Pair], **kwargs: Any) -> Tensor:
    """Scores of pairs, float32 on the CPU, in the pairs' order; see `QueritForSequenceRanking.predict`."""
    return torch.tensor([score for _, score in score_stream(model, pairs, **kwargs)], dtype=torch.float32)


def score_stream(
    model: QueritForSequenceRanking,
    pairs: Iterable[Pair],
    *,
    instruction: str | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    total: int | None = None,
    optimizations: Optimizations = ALL,
) -> Iterator[tuple[Pair, float]]:
    """Each pair with its score, in the pairs' order, while `pairs` is read: memory does not grow with its length.

    Arguments are those of `QueritForSequenceRanking.predict`; `total` is for the progress bar, where `pairs` has no
    length.
    """
    if not isinstance(instruction, str | None):
        raise TypeError(f"instruction is {instruction!r}: give one string, for all pairs.")
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(model)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}: a batch needs at least one token.")

    def scored(batch_tokens: int) -> Iterator[tuple[Pair, float]]:
        index = 0
        with _progress_bar(pairs, total, show_progress_bar) as progress:
            for window in _windows(model, pairs, instruction, max_length, batch_tokens * _PASSES_AT_ONCE):
                scoring = _Window(model, window, batch_tokens, optimizations)
                scores = scoring.scores(progress)
                _check_finite(scores, index)
                # What did not fit into memory once need not be tried again.
                batch_tokens = scoring.batch_tokens
                index += len(window)
                yield from zip((pair for pair, _ in window), scores.tolist(), strict=True)

    return scored(batch_tokens)


def _progress_bar(pairs: Iterable[Pair], total: int | None, show: bool | None) -> Any:
    return logging.tqdm(
        total=len(pairs) if isinstance(pairs, Sized) else total,
        desc="Scoring",
        unit="pair",
        delay=0 if show else _PROGRESS_DELAY,
        disable=None if show is None else not show,
    )


def default_batch_tokens(model: QueritForSequenceRanking) -> int:
    """Tokens of a forward pass: 2,048 of a dense model on a CPU, whose caches hold them, and 8,192 otherwise.

    Experts are fastest where each gets many tokens, and so is a GPU.
    """
    has_experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None) is not None
    return 8192 if has_experts or model.device.type != "cpu" else 2048


def _windows(
    model: QueritForSequenceRanking, pairs: Iterable[Pair], instruction: str | None, max_length: int | None, tokens: int
) -> Iterator[list[tuple[Pair, EncodedPair]]]:
    """Pairs with their token ids, in lists of about so many tokens."""
    pairs, window, size = map(_checked, pairs, itertools.count()), [], 0
    while some := list(itertools.islice(pairs, _PAIRS_AT_ONCE)):
        queries, documents = [query for query, _ in some], [document for _, document in some]
        encoded = model.processor.encode(queries, documents, instruction, max_length)
        _warn_about_cuts(encoded)
        window += zip(some, encoded, strict=True)
        size += sum(len(each.input_ids) for each in encoded)
        if size >= tokens:
            yield window
            window, size = [], 0
    if window:
        yield window


def _checked(pair: Pair, index: int) -> Pair:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"Pair {index} is {pair!r}: give (query, document) tuples.")
    return pair


class _Window:
    """Pairs that are planned, and scored, together."""

    def __init__(
        self,
        model: QueritForSequenceRanking,
        window: Sequence[tuple[Pair, EncodedPair]],
        batch_tokens: int,
        optimizations: Optimizations,
    ):
        self.model = model
        self.batch_tokens = batch_tokens
        self.optimizations = optimizations
        self.queries = [query for (query, _), _ in window]
        self.input_ids = [encoded.input_ids for _, encoded in window]
        self.done: dict[int, float] = {}
        # Tokens and pairs of the forward pass that is under way.
        self.tokens, self.pairs = 0, 0

    def scores(self, progress: Any) -> Tensor:
        """(pairs,) in float32; where memory runs out, the rest is scored in smaller batches."""
        with exclusive(self.model), _evaluating(self.model), torch.inference_mode():
            while len(self.done) < len(self.input_ids):
                try:
                    for pairs, scores in self._packed() if self._can_pack() else self._padded():
                        self.done.update(zip(pairs, scores.float().tolist(), strict=True))
                        progress.update(len(pairs))
                except CannotPack:
                    _unpackable.add(self.model)
                except (RuntimeError, MemoryError) as error:
                    if self._converts() and _is_of_mixed_dtypes(error):
                        _unconvertible.add(self.model)
                    else:
                        self._make_smaller(error)
        return torch.tensor([self.done[pair] for pair in range(len(self.input_ids))], dtype=torch.float32)

    def _can_pack(self) -> bool:
        return self.optimizations.packs and self.model not in _unpackable and attends_plainly(self.model.model)

    def _converts(self) -> bool:
        return self.optimizations.converts and self.model not in _unconvertible

    def _packed(self) -> Iterator[tuple[list[int], Tensor]]:
        states: States = {}
        for pack in plan_packs(self.input_ids, self._groups(), self.batch_tokens, self.optimizations.share_prefix):
            self.tokens, self.pairs = len(pack), len(pack.pairs)
            scores, states = score_pack(
                self.model,
                pack,
                states,
                reads_last_only=self.optimizations.reads_last_only,
                converts=self._converts(),
            )
            yield pack.pairs, scores

    def _groups(self) -> list[list[int]]:
        """What is not done, by query, the longest first; queries of a single pair share at least the instruction."""
        by_query: dict[str, list[int]] = {}
        for pair, query in enumerate(self.queries):
            if pair not in self.done:
                by_query.setdefault(query, []).append(pair)
        groups = [pairs for pairs in by_query.values() if len(pairs) > 1]
        singles = [pairs[0] for pairs in by_query.values() if len(pairs) == 1]
        return [sorted(group, key=lambda pair: -len(self.input_ids[pair])) for group in [*groups, singles] if group]

    def _padded(self) -> Iterator[tuple[list[int], Tensor]]:
        left = [pair for pair in range(len(self.input_ids)) if pair not in self.done]
        batch_tokens = 1 if rotates_by_length(self.model.model) else self.batch_tokens
        for batch in plan_batches([len(self.input_ids[pair]) for pair in left], batch_tokens):
            pairs = [left[place] for place in batch]
            inputs = self.model.processor.pad([self.input_ids[pair] for pair in pairs]).to(self.model.device)
            self.tokens, self.pairs = inputs["input_ids"].numel(), len(pairs)
            yield pairs, score_padded(self.model, **inputs, converts=self._converts())

    def _make_smaller(self, error: Exception) -> None:
        if not _is_out_of_memory(error):
            raise error
        if self.pairs == 1:
            raise RuntimeError(
                f"A pair of {self.tokens} tokens does not fit into memory: give a smaller max_length."
            ) from error
        self.batch_tokens = min(self.batch_tokens, self.tokens) // 2
        logger.warning(f"Out of memory with {self.tokens} tokens at once; going on with {self.batch_tokens}.")
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    # The allocators of CPUs and of Apple's GPUs have no exception of their own.
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in str(error) for each in words)


def _is_of_mixed_dtypes(error: Exception) -> bool:
    return "scalar type" in str(error) or "same dtype" in str(error)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of `lengths`, longest first, in batches of at most `batch_tokens` tokens with their padding.

    The longest come first, so that running out of memory happens at once. A single text over the budget is a
    batch by itself.
    """
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


def _check_finite(scores: Tensor, first: int) -> None:
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        value = scores[bad[0]].item()
        kind = "NaN" if math.isnan(value) else "infinite"
        raise ValueError(
            f"The score of document {first + bad[0]} is {kind} ({len(bad)} of {len(scores)} are): in float16 the "
            "activations can overflow, load the model in bfloat16 or float32; otherwise its weights are damaged."
        )
