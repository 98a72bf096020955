"""One thread that scores what all requests ask for, together, a forward pass at a time.

Jobs are served by earliest deadline, on a clock that counts computed tokens: a job of T tokens that arrives at time C
has the deadline C + 4 T. So a short request overtakes long ones that came a while before it, but only for a bounded
time: whatever arrives later than 4 T tokens of work comes after. A step takes pairs from as many jobs as fit into one
forward pass, and a job is answered at the end of the step that scores its last pair.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..pair_encoding_querit import Pair
from .jobs import Job, Options, Slice
from .metrics import Metrics

logger = logging.getLogger(__name__)

# How many times its own work a job may wait for others.
_PATIENCE = 4
# Weight of the newest step in the moving average of the speed.
_SMOOTHING = 0.2

ScorePairs = Callable[[Sequence[Pair], Options], list[float]]


class QueueFullError(Exception):
    """More pairs wait than the server keeps.

    Args:
        seconds: Time after which there is room again, as far as can be told.
    """

    def __init__(self, seconds: float):
        super().__init__(f"The queue is full; try again in {seconds:.0f} s.")
        self.seconds = seconds


class Scheduler:
    """Scores jobs in a thread of its own.

    Args:
        score_pairs: Function from pairs and options to scores, called by that thread only.
        batch_tokens: Number of tokens of a step, which is one forward pass.
        max_queue: Maximum number of pairs that wait.
        metrics: Prometheus metrics to update.
    """

    def __init__(self, score_pairs: ScorePairs, batch_tokens: int, max_queue: int, metrics: Metrics):
        self._score_pairs = score_pairs
        self._batch_tokens = batch_tokens
        self._max_queue = max_queue
        self._metrics = metrics
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._reserved = 0
        self._clock = 0
        self._tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="querit-scoring", daemon=True)
        metrics.watch_queue(self.waiting_pairs)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Score what is left, and end the thread; submit nothing after."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def is_running(self) -> bool:
        """Whether jobs are accepted."""
        return self._thread.is_alive() and not self._closing

    def waiting_pairs(self) -> int:
        """Number of pairs that wait for a step, or are on their way to the queue."""
        with self._changed:
            return self._waiting_pairs()

    @contextmanager
    def room(self, pairs: int) -> Iterator[None]:
        """Reserve room for the pairs of a job, which is made and submitted in this block.

        Raises:
            QueueFullError: if they are too many; whoever finds an empty queue always gets room.
        """
        with self._changed:
            waiting = self._waiting_pairs()
            if waiting and waiting + pairs > self._max_queue:
                raise QueueFullError(self._seconds_to_go())
            self._reserved += pairs
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= pairs

    def submit(self, job: Job) -> None:
        """Queue a job, whose future then holds its scores.

        Raises:
            RuntimeError: if the scheduler does not run.
        """
        if job.is_complete:
            job.finish()
            return
        with self._changed:
            if not self.is_running:
                raise RuntimeError("The scheduler does not run.")
            job.deadline = self._clock + _PATIENCE * job.work
            self._jobs.append(job)
            self._changed.notify()

    def _waiting_pairs(self) -> int:
        return self._reserved + sum(job.waiting for job in self._jobs if not job.future.cancelled())

    def _seconds_to_go(self) -> float:
        tokens = sum(job.work for job in self._jobs)
        return tokens / self._tokens_per_second if self._tokens_per_second else 1.0

    def _run(self) -> None:
        while (step := self._next_step()) is not None:
            slices, tokens = step
            start = time.monotonic()
            self._score(slices)
            self._finish_step(slices, tokens, time.monotonic() - start)

    def _next_step(self) -> tuple[list[Slice], int] | None:
        """Wait for jobs and choose what is scored next; None at the end."""
        with self._changed:
            while True:
                self._jobs = [job for job in self._jobs if job.waiting and not job.future.cancelled()]
                if self._jobs:
                    return self._choose()
                if self._closing:
                    return None
                self._changed.wait()

    def _choose(self) -> tuple[list[Slice], int]:
        """Take pairs by deadline; those of one step share their options."""
        jobs = sorted(self._jobs, key=lambda job: job.deadline)
        options = jobs[0].options
        slices: list[Slice] = []
        queries: set[str] = set()
        tokens = 0
        now = time.monotonic()
        for job in jobs:
            if job.options != options:
                continue
            is_new = not job.started
            taken, used = job.take(self._batch_tokens - tokens, queries, at_least_one=not slices)
            if not taken.indices:
                break
            if is_new:
                self._metrics.queue_seconds.observe(now - job.created)
            slices.append(taken)
            tokens += used
        return slices, tokens

    def _score(self, slices: Sequence[Slice]) -> None:
        """Score a step; if that fails, each job by itself, so that one cannot spoil the others."""
        try:
            scores = self._score_pairs([pair for part in slices for pair in part.pairs], slices[0].job.options)
        except Exception as error:
            if len(slices) == 1:
                # Without the message, which may hold a part of a document.
                logger.error("Scoring failed: %s", type(error).__name__)
                slices[0].job.fail(error)
                return
            for part in slices:
                self._score([part])
            return
        start = 0
        for part in slices:
            part.job.add_scores(part.indices, scores[start : start + len(part.indices)])
            start += len(part.indices)

    def _finish_step(self, slices: Sequence[Slice], tokens: int, seconds: float) -> None:
        with self._changed:
            self._clock += tokens
            speed = tokens / max(seconds, 1e-6)
            self._tokens_per_second += (speed - self._tokens_per_second) * (
                _SMOOTHING if self._tokens_per_second else 1
            )
        self._metrics.count_step(
            pairs=sum(len(part.indices) for part in slices), tokens=tokens, fill=tokens / self._batch_tokens
        )
        for part in slices:
            if part.job.is_complete:
                part.job.finish()
