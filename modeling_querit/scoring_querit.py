"""From token ids to scores: windows of pairs in packs or padded batches, made smaller where memory runs out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.utils import logging

from .offloading_querit import execution_device, forward_lock
from .packed_attention_querit import KeyValueStates, PackingError
from .packed_forward_querit import is_causal, rope_depends_on_length, supports_packing
from .packing_querit import plan_packs
from .pair_encoding_querit import EncodedPair, Pair
from .shallow_copies_querit import evaluation_copy

if TYPE_CHECKING:
    from .modeling_querit import QueritForSequenceRanking

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Optimizations:
    """What ranking does to save time; none of it changes a score by more than rounding does.

    Args:
        packing: Whether pairs are packed, so that no padding is computed.
        share_prefix: Whether the prefix that the pairs of a query share is computed once. Needs `packing`, and a
            backbone with causal attention.
        prune_last_layer: Whether the last layer computes only keys and values for tokens that are not scored.
            Needs `packing`.
        mixed_precision: Whether to compute in the dtypes that are fastest on this processor: hidden states in float32
            on CPUs without matrix units; with int8 weights, hidden states quantized once for all layers that read them.
    """

    packing: bool = True
    share_prefix: bool = True
    prune_last_layer: bool = True
    mixed_precision: bool = True


ALL = Optimizations()


class Cancelled(Exception):
    """Nobody waits for the scores any more."""


class Progress:
    """Counts the pairs that are done, and stops the scoring once it was cancelled.

    Args:
        bar: Progress bar.
        cancelled: Event that is set when the scoring shall stop.
    """

    def __init__(self, bar: Any, cancelled: threading.Event | None = None):
        self.bar = bar
        self.cancelled = cancelled

    def update(self, count: int) -> None:
        """Count pairs.

        Raises:
            Cancelled: if the scoring was cancelled.
        """
        self.bar.update(count)
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled


# Models whose attention turned out to be more than packs can express, and models in which float32 hidden states reach a
# lower-precision weight outside a linear or norm layer.
_cannot_pack: WeakSet[torch.nn.Module] = WeakSet()
_cannot_mix_precision: WeakSet[torch.nn.Module] = WeakSet()


_processes_that_rank: set[int] = set()


def _compute_alone() -> None:
    """Let a forked child compute in one thread: GNU OpenMP would wait forever for the threads of its parent."""
    if os.getppid() in _processes_that_rank:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_alone)


def default_batch_tokens(model: QueritForSequenceRanking) -> int:
    """Return the number of tokens in a forward pass by default.

    2,048 for a dense model on a CPU (fits in cache), otherwise 8,192: GPUs and MoE layers need large batches.
    """
    has_experts = getattr(model.config.get_text_config(), "num_experts_per_tok", None) is not None
    return 8192 if has_experts or execution_device(model).type != "cpu" else 2048


class Window:
    """Pairs that are planned, and scored, together.

    Args:
        model: The reranker.
        pairs: The (query, document) pairs.
        encoded: Token ids of each pair.
        batch_tokens: Maximum number of tokens in a forward pass; halved if memory runs out.
        optimizations: Enabled speed optimizations.
    """

    def __init__(
        self,
        model: QueritForSequenceRanking,
        pairs: Sequence[Pair],
        encoded: Sequence[EncodedPair],
        batch_tokens: int,
        optimizations: Optimizations,
    ):
        self.model = model
        # The same weights, for forward passes alone.
        self.evaluated = evaluation_copy(model)
        self.batch_tokens = batch_tokens
        self.optimizations = optimizations
        self.queries = [query for query, _ in pairs]
        self.input_ids = [pair.input_ids for pair in encoded]
        self.done: dict[int, float] = {}
        # Size of the forward pass that is under way.
        self.num_tokens, self.num_pairs = 0, 0

    def score(self, progress: Progress) -> Tensor:
        """Score all pairs, (pairs,) in float32; if memory runs out, the rest is scored in smaller batches."""
        _processes_that_rank.add(os.getpid())
        with forward_lock(self.model), torch._C._InferenceMode(True):
            while len(self.done) < len(self.input_ids):
                try:
                    for pairs, scores in self._score_packed() if self._can_pack() else self._score_padded():
                        self.done.update(zip(pairs, scores.flatten().tolist(), strict=True))
                        progress.update(len(pairs))
                except PackingError:
                    _cannot_pack.add(self.model)
                except (RuntimeError, MemoryError) as error:
                    if self._mixes_precision() and _is_about_mixed_dtypes(error):
                        _cannot_mix_precision.add(self.model)
                    else:
                        self._make_smaller(error)
        return torch.tensor([self.done[pair] for pair in range(len(self.input_ids))], dtype=torch.float32)

    def _can_pack(self) -> bool:
        return self.optimizations.packing and self.model not in _cannot_pack and supports_packing(self.model.model)

    def _mixes_precision(self) -> bool:
        return self.optimizations.mixed_precision and self.model not in _cannot_mix_precision

    def _score_packed(self) -> Iterator[tuple[list[int], Tensor]]:
        carried: KeyValueStates | None = None
        share_prefix = self.optimizations.share_prefix and is_causal(self.model.model)
        for pack in plan_packs(self.input_ids, self._groups(), self.batch_tokens, share_prefix):
            self.num_tokens, self.num_pairs = len(pack), len(pack.pairs)
            output = self.evaluated(
                pack=pack,
                carried=carried,
                prune_last_layer=self.optimizations.prune_last_layer,
                mixed_precision=self._mixes_precision(),
            )
            carried = output.carried
            yield pack.pairs, output.score

    def _groups(self) -> list[list[int]]:
        """Group pairs that are not done by query, the longest first; queries of a single pair share the instruction."""
        by_query: dict[str, list[int]] = {}
        for pair, query in enumerate(self.queries):
            if pair not in self.done:
                by_query.setdefault(query, []).append(pair)
        groups = [pairs for pairs in by_query.values() if len(pairs) > 1]
        singles = [pairs[0] for pairs in by_query.values() if len(pairs) == 1]
        return [sorted(group, key=lambda pair: -len(self.input_ids[pair])) for group in [*groups, singles] if group]

    def _score_padded(self) -> Iterator[tuple[list[int], Tensor]]:
        remaining = [pair for pair in range(len(self.input_ids)) if pair not in self.done]
        batch_tokens = 1 if rope_depends_on_length(self.model.model) else self.batch_tokens
        for batch in plan_batches([len(self.input_ids[pair]) for pair in remaining], batch_tokens):
            pairs = [remaining[index] for index in batch]
            inputs = self.model.processor.pad([self.input_ids[pair] for pair in pairs]).to(execution_device(self.model))
            self.num_tokens, self.num_pairs = inputs["input_ids"].numel(), len(pairs)
            yield pairs, self.evaluated(**inputs, mixed_precision=self._mixes_precision()).score

    def _make_smaller(self, error: Exception) -> None:
        if not _is_out_of_memory(error):
            raise error
        if self.num_pairs == 1:
            raise RuntimeError(
                f"A pair of {self.num_tokens} tokens does not fit into memory: give a smaller max_length."
            ) from error
        self.batch_tokens = min(self.batch_tokens, self.num_tokens) // 2
        logger.warning(f"Out of memory with {self.num_tokens} tokens at once; continuing with {self.batch_tokens}.")
        if execution_device(self.model).type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    # The allocators of CPUs and of Apple's GPUs have no exception of their own.
    phrases = ("can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(phrase in str(error) for phrase in phrases)


def _is_about_mixed_dtypes(error: Exception) -> bool:
    return "scalar type" in str(error) or "same dtype" in str(error)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of `lengths`, longest first, in batches of at most `batch_tokens` tokens with their padding.

    The longest come first, so that running out of memory shows up immediately. A single text over the budget is a batch
    by itself.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count
