"""From a request's pairs to their scores: tokenized beside the event loop, looked up in the cache, scored together."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from ..pair_encoding_querit import Pair
from ..processing_querit import QueritProcessor
from ..ranking_querit import score_stream
from ..scoring_querit import default_batch_tokens
from .cache import ScoreCache, pair_key
from .errors import RequestError
from .jobs import Job, Options
from .metrics import Metrics
from .scheduler import QueueFullError, Scheduler
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..modeling_querit import QueritForSequenceRanking

# One long request does not keep short ones from being tokenized.
_TOKENIZING_THREADS = 2
_LONGEST_RETRY_SECONDS = 600


class Scored(NamedTuple):
    """Scores of a request's pairs, in their order, and the number of tokens of all pairs."""

    scores: list[float]
    tokens: int


class Engine:
    """A model and the scheduler in front of it.

    Args:
        model: The reranker.
        settings: Limits and sizes.
        metrics: Prometheus metrics to update.
    """

    def __init__(self, model: QueritForSequenceRanking, settings: ServerSettings, metrics: Metrics):
        self.max_length = min(model.processor.max_length, settings.max_length or model.processor.max_length)
        self._model = model
        self._metrics = metrics
        # A tokenizer of its own: that of the model is at work in the scoring thread.
        self._processor = QueritProcessor(copy.deepcopy(model.processor.tokenizer), self.max_length)
        self._tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, "querit-tokenizing")
        self._cache = ScoreCache(settings.cache_mb)
        self._batch_tokens = settings.batch_tokens or default_batch_tokens(model)
        self._scheduler = Scheduler(self._score_pairs, self._batch_tokens, settings.max_queue, metrics)

    def start(self) -> None:
        """Start scoring, after a first pass that sets everything up."""
        self._score_pairs([("query", "document")], Options())
        self._processor.encode(["query"], ["document"])
        self._scheduler.start()

    def close(self) -> None:
        """Score what is left, and end all threads."""
        self._scheduler.close()
        self._tokenizing.shutdown()

    @property
    def is_running(self) -> bool:
        """Whether requests are scored."""
        return self._scheduler.is_running

    async def score(self, pairs: Sequence[Pair], options: Options, *, may_cut: bool) -> Scored:
        """Score pairs; cancel the call to have the rest of them not scored.

        Args:
            pairs: The (query, document) pairs.
            options: Instruction and maximum length.
            may_cut: Whether pairs that are too long are cut; else they are refused.

        Raises:
            RequestError: if a pair does not fit, or the queue is full.
        """
        asked = self.max_length if options.max_length is None else options.max_length
        options = options._replace(max_length=min(asked, self.max_length))
        loop = asyncio.get_running_loop()
        try:
            with self._scheduler.room(len(pairs)):
                job, keys = await loop.run_in_executor(self._tokenizing, self._prepare, pairs, options, may_cut)
                self._scheduler.submit(job)
        except QueueFullError as error:
            seconds = min(max(1, round(error.seconds)), _LONGEST_RETRY_SECONDS)
            message = f"The queue is full: try again in {seconds} s."
            raise RequestError(429, message, {"Retry-After": str(seconds)}) from None
        # Cancelling this call cancels the job's future.
        scores = await asyncio.wrap_future(job.future)
        for key, score in zip(keys, scores, strict=True):
            self._cache.put(key, score)
        return Scored(scores, job.tokens)

    def _prepare(self, pairs: Sequence[Pair], options: Options, may_cut: bool) -> tuple[Job, list[bytes]]:
        queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
        try:
            encoded = self._processor.encode(queries, documents, options.instruction, options.max_length)
        except ValueError as error:
            # An instruction that leaves no room.
            raise RequestError(422, str(error)) from None
        too_long = [index for index, pair in enumerate(encoded) if pair.cut_content or pair.cut_query]
        if too_long and not may_cut:
            pair = encoded[too_long[0]]
            message = (
                f"Document {too_long[0]} is {pair.cut_content + pair.cut_query} tokens too long for the limit of "
                f"{options.max_length}: shorten it, or leave out truncate."
            )
            raise RequestError(413, message)
        keys = [pair_key(pair, options.instruction, options.max_length) for pair in pairs]
        known = [self._cache.get(key) for key in keys]
        self._metrics.cached_pairs.inc(sum(score is not None for score in known))
        return Job(pairs, options, encoded, known), keys

    def _score_pairs(self, pairs: Sequence[Pair], options: Options) -> list[float]:
        """Score pairs at once; called by the scheduler's thread."""
        scored = score_stream(
            self._model,
            pairs,
            instruction=options.instruction,
            max_length=options.max_length or self.max_length,
            batch_tokens=self._batch_tokens,
            show_progress_bar=False,
        )
        return [score for _, score in scored]
