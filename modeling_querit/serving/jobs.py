"""One request's pairs on their way through the scheduler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from ..packing_querit import common_prefix
from ..pair_encoding_querit import EncodedPair, Pair


class Options(NamedTuple):
    """What all pairs of a forward pass have in common.

    Args:
        instruction: The task in one sentence; None is the default one.
        max_length: Maximum number of tokens of a pair; None is the model's.
    """

    instruction: str | None = None
    max_length: int | None = None


class Slice(NamedTuple):
    """Pairs of one job that are scored in the same step."""

    job: Job
    indices: list[int]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs themselves."""
        return [self.job.pairs[index] for index in self.indices]


class Job:
    """The pairs of one request, what scoring them costs, and the scores that are there.

    Args:
        pairs: The (query, document) pairs.
        options: Instruction and maximum length.
        encoded: The tokenized pairs.
        known: Score of each pair that need not be computed, else None.

    Attributes:
        future: The scores in the order of the pairs; cancel it to have the rest not scored.
        tokens: Number of tokens of all pairs.
        work: Number of tokens to compute: a prefix that pairs of a query share counts once.
        deadline: Set by the scheduler: the smaller, the sooner the job is scored.
        started: Whether a pair has been handed out.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        options: Options,
        encoded: Sequence[EncodedPair],
        known: Sequence[float | None],
    ):
        self.pairs = pairs
        self.options = options
        self.future: Future[list[float]] = Future()
        self.deadline = 0.0
        self.started = False
        self.created = time.monotonic()
        self.tokens = sum(len(pair.input_ids) for pair in encoded)
        self._lengths = [len(pair.input_ids) for pair in encoded]
        self._scores = list(known)
        self._waiting = deque(index for index, score in enumerate(known) if score is None)
        self._missing = len(self._waiting)
        self._prefixes = self._shared_prefixes(encoded)
        rests = sum(self._lengths[index] - self._prefixes[self.pairs[index][0]] for index in self._waiting)
        self.work = rests + sum(self._prefixes.values())

    def _shared_prefixes(self, encoded: Sequence[EncodedPair]) -> dict[str, int]:
        """Number of tokens that the pairs of each query share."""
        by_query: dict[str, list[list[int]]] = {}
        for index in self._waiting:
            by_query.setdefault(self.pairs[index][0], []).append(encoded[index].input_ids)
        return {query: len(common_prefix(input_ids)) for query, input_ids in by_query.items()}

    @property
    def waiting(self) -> int:
        """Number of pairs that have not been handed out."""
        return len(self._waiting)

    @property
    def is_complete(self) -> bool:
        """Whether every pair has its score."""
        return self._missing == 0

    def take(self, budget: int, queries: set[str], *, at_least_one: bool) -> tuple[Slice, int]:
        """Hand out waiting pairs, in order, as long as they fit.

        Args:
            budget: Number of tokens that there is room for.
            queries: Queries whose prefix is computed in this step already; those of the pairs are added.
            at_least_one: Whether to hand out the first pair even if it does not fit.

        Returns:
            The pairs, and the number of tokens that they add.
        """
        taken, used = Slice(self, []), 0
        while self._waiting:
            index = self._waiting[0]
            query = self.pairs[index][0]
            cost = self._lengths[index] - (self._prefixes[query] if query in queries else 0)
            if used + cost > budget and not (at_least_one and not taken.indices):
                break
            self._waiting.popleft()
            taken.indices.append(index)
            queries.add(query)
            used += cost
        self.started = self.started or bool(taken.indices)
        return taken, used

    def add_scores(self, indices: Sequence[int], scores: Sequence[float]) -> None:
        """Store the scores of pairs that were handed out."""
        for index, score in zip(indices, scores, strict=True):
            self._scores[index] = score
        self._missing -= len(indices)

    def finish(self) -> bool:
        """Give the scores to whoever waits for them; whether somebody still does."""
        if not self.future.set_running_or_notify_cancel():
            return False
        self.future.set_result([score for score in self._scores if score is not None])
        return True

    def fail(self, error: Exception) -> None:
        """Give up on the job."""
        self._waiting.clear()
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
