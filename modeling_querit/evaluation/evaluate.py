"""How well rerankers order the candidates of a first stage, measured on relevance judgements (qrels)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import logging

from ..pair_encoding_querit import document_text
from ..retrieval.collection import Collection
from ..retrieval.fusion import min_max
from ..retrieval.sampling import Retriever
from .comparison import bootstrap_interval, p_value
from .first_stages import (
    BM25_NAME,
    Candidates,
    check_collection,
    find_candidates,
    first_stage_candidates,
    sample_queries,
)
from .metrics import PerQuery, expected_mrr, expected_ndcg, mean, mrr, ndcg
from .sources import find_collection

logger = logging.get_logger(__name__)

# Query id -> a score for each of its candidates, in their order; None or NaN where a pair could not be scored.
Scores = Mapping[str, Sequence[float | None]]

NDCG, MRR = "ndcg_at_10", "mrr_at_10"
# Systems that every evaluation has, beside the rerankers: the order expected by chance, and the bounds of the rest.
RANDOM, FIRST_STAGE, BEST_ORDER = "random", "first_stage", "best_order"


class Reranker(Protocol):
    """A model that scores pairs: a Querit reranker, a `CrossEncoder`, or anything with the same method."""

    @property
    def predict(self) -> Callable[..., Any]:
        """Score a list of (query, document text) pairs: one number each, higher is more relevant."""


Model = Reranker | str | os.PathLike[str]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of several systems over the same candidates of the same queries.

    Args:
        collection: Name of the collection.
        candidates: The documents that every system put in order, with their first-stage scores.
        metrics: Metric (`ndcg_at_10`, `mrr_at_10`) -> system -> query id -> value in [0, 1]. Systems are `random` (the
            value expected of a random order), `first_stage`, each reranker, each reranker's scores added to those of
            the first stage (`fused(name)`), and `best_order`, the oracle order: what a perfect reranker would reach.
        seed: Seed of intervals and p-values.
    """

    collection: str
    candidates: Candidates
    metrics: dict[str, dict[str, PerQuery]]
    seed: int = 0

    @property
    def systems(self) -> list[str]:
        """Names of all systems, in the order of a table."""
        return list(self.metrics[NDCG])

    @property
    def pairs(self) -> int:
        """Number of (query, candidate) pairs that each reranker scored."""
        return sum(map(len, self.candidates.values()))

    def mean(self, system: str, metric: str = NDCG) -> float:
        """Return the mean over queries, in [0, 1]."""
        return mean(self.metrics[metric][system])

    def interval(self, system: str, metric: str = NDCG) -> tuple[float, float]:
        """Compute the 95 % confidence interval of the mean, by bootstrap over queries."""
        return bootstrap_interval(self.metrics[metric][system], self.seed)

    def p_value(self, system: str, baseline: str = FIRST_STAGE, metric: str = NDCG) -> float:
        """Compute the two-sided p-value of the difference from a baseline, by a paired randomization test."""
        return p_value(self.metrics[metric][system], self.metrics[metric][baseline], self.seed)

    def summary(self) -> dict[str, Any]:
        """Return means, intervals and p-values against the first stage, ready for JSON.

        Returns:
            `{"collection", "queries", "pairs", "systems": {name: {metric, metric_interval, metric_p_value, ...}}}`.
        """
        systems: dict[str, dict[str, Any]] = {}
        for system in self.systems:
            systems[system] = {}
            for metric in self.metrics:
                systems[system][metric] = self.mean(system, metric)
                systems[system][f"{metric}_interval"] = list(self.interval(system, metric))
                systems[system][f"{metric}_p_value"] = self.p_value(system, FIRST_STAGE, metric)
        return {
            "collection": self.collection,
            "queries": len(self.metrics[NDCG][FIRST_STAGE]),
            "pairs": self.pairs,
            "systems": systems,
        }


def evaluate(
    model: Model | Mapping[str, Model],
    collection: Collection | str | os.PathLike[str],
    *,
    first_stage: Retriever | str = BM25_NAME,
    candidates: Candidates | None = None,
    depth: int = 100,
    limit: int | None = None,
    seed: int = 0,
    predict_options: Mapping[str, Any] | None = None,
    show_progress_bar: bool | None = None,
) -> Evaluation:
    """Measure rerankers on a collection: nDCG@10 and MRR@10 of each query, beside its first stage and its bounds.

    Args:
        model: A reranker: "mini", a folder or repository to load it from, or an object with `predict`. Or several of
            these by name; they are loaded one after the other. One without a name is called after its folder, or
            `model`.
        collection: Documents, queries and relevance judgements; or where they are: `FOLDER:SPLIT`, or
            `ir_datasets:ID`.
        first_stage: Index over the collection's documents, or its name, as in `find_candidates`.
        candidates: Documents to put in order, from `first_stage_candidates`, to measure on the same ones again. By
            default all that the collection lists for a query, or else the first stage's best `depth`.
        depth: Candidates per query for which the collection lists none.
        limit: Number of queries, drawn at random; by default all that have a relevant document.
        seed: Seed of the draw, the intervals and the p-values.
        predict_options: Keyword arguments of every `predict`, such as `max_length`.
        show_progress_bar: Whether a bar shows the queries done; by default only on a terminal.

    Raises:
        ValueError: if no query has a relevant document, the collection holds none of these, a query has no text, a name
            is that of another system, or a model returns another number of scores than it was given pairs.
        OSError: if a model or the collection cannot be loaded.

    Example:
        ```python
        >>> result = evaluate("mini", "data/scifact:test", depth=20, limit=50)
        >>> result.mean("mini"), result.interval("mini"), result.p_value("mini", "first_stage")
        ```
    """
    models = model if isinstance(model, Mapping) else {name_of(model): model}
    if isinstance(collection, str | os.PathLike):
        collection = find_collection(os.fspath(collection)).load()
    if candidates is None:
        queries = sample_queries(collection, limit, seed)
        warning = check_collection(collection, queries)
        candidates = (
            find_candidates(collection, first_stage, queries, depth)
            if isinstance(first_stage, str)
            else first_stage_candidates(collection, first_stage, queries, depth)
        )
    else:
        warning = check_collection(collection, list(candidates))
    if warning:
        logger.warning(warning)
    scores = {
        name: score_candidates(reranker, collection, candidates, predict_options, show_progress_bar)
        for name, reranker in models.items()
    }
    return evaluate_scores(scores, collection, candidates, seed)


def name_of(model: Model) -> str:
    """Name for a table: that of a folder or repository; `model` for an object."""
    if not isinstance(model, str | os.PathLike):
        return "model"
    return Path(model).resolve().name if Path(model).is_dir() else os.fspath(model)


def evaluate_scores(
    scores: Mapping[str, Scores], collection: Collection, candidates: Candidates, seed: int = 0
) -> Evaluation:
    """Measure scores that are already there: the second half of `evaluate`.

    Args:
        scores: Reranker -> query id -> a score for each candidate; candidates without a score (None, NaN) come last.
        collection: The collection that the candidates are from.
        candidates: The documents that were scored.
        seed: Seed of intervals and p-values.

    Raises:
        ValueError: if a name is that of another system, or a query has more or fewer scores than candidates.
    """
    rankings = _bounds(collection, candidates)
    for name, by_query in scores.items():
        if name == RANDOM or name in rankings:
            raise ValueError(f"A reranker cannot be named {name!r}: that is the name of another system.")
        rankings[name], rankings[fused(name)] = {}, {}
        for query, hits in candidates.items():
            values = [_or_minus_infinity(score) for score in by_query.get(query, ())]
            if len(values) != len(hits):
                raise ValueError(f"{name}: query {query} has {len(hits)} candidates, but {len(values)} scores.")
            sums = [sum(pair) for pair in zip(_min_max(list(hits.values())), _min_max(values), strict=True)]
            rankings[name][query] = by_score(list(hits), values)
            rankings[fused(name)][query] = by_score(list(hits), sums)
    # Last in tables.
    rankings[BEST_ORDER] = rankings.pop(BEST_ORDER)
    qrels, documents = collection.qrels, rankings[FIRST_STAGE]
    metrics = {
        NDCG: {RANDOM: expected_ndcg(qrels, documents)} | {name: ndcg(qrels, run) for name, run in rankings.items()},
        MRR: {RANDOM: expected_mrr(qrels, documents)} | {name: mrr(qrels, run) for name, run in rankings.items()},
    }
    return Evaluation(collection.name, candidates, metrics, seed)


def _bounds(collection: Collection, candidates: Candidates) -> dict[str, dict[str, list[str]]]:
    """Return the first stage's rankings, and the best ones that its candidates allow."""
    first_stage, best_order = {}, {}
    for query, hits in candidates.items():
        grades = collection.qrels.get(query, {})
        first_stage[query] = list(hits)
        best_order[query] = by_score(list(hits), [grades.get(document, 0) for document in hits])
    return {FIRST_STAGE: first_stage, BEST_ORDER: best_order}


def _or_minus_infinity(score: float | None) -> float:
    """Return a score; minus infinity, which ranks last, for a missing one."""
    return -math.inf if score is None or math.isnan(score) else float(score)


def fused(name: str) -> str:
    """Name of the system that adds a reranker's scores to the first stage's, each scaled to [0, 1] within a query."""
    return f"{FIRST_STAGE} + {name}"


def score_candidates(
    model: Reranker | str | os.PathLike[str],
    collection: Collection,
    candidates: Candidates,
    predict_options: Mapping[str, Any] | None = None,
    show_progress_bar: bool | None = None,
) -> dict[str, list[float]]:
    """Score each candidate: query id -> a model's scores, in the candidates' order.

    Args:
        model: The model, or the folder or repository to load it from; a model that is loaded here computes on the GPU
            where there is one.
        collection: The collection that the candidates are from.
        candidates: The documents to score.
        predict_options: Keyword arguments of `predict`.
        show_progress_bar: Whether a bar shows the queries done; by default only on a terminal.

    Raises:
        ValueError: if the model returns another number of scores than it was given pairs, or NaN.
    """
    reranker = _load(model) if isinstance(model, str | os.PathLike) else model
    hide = None if show_progress_bar is None else not show_progress_bar
    return {
        query: score_query(reranker, collection, query, list(hits), predict_options)
        for query, hits in logging.tqdm(
            candidates.items(), desc=collection.name, unit="query", leave=False, disable=hide
        )
    }


def score_query(
    model: Reranker,
    collection: Collection,
    query: str,
    documents: Sequence[str],
    predict_options: Mapping[str, Any] | None = None,
) -> list[float]:
    """Score the candidates of one query, by ids: a float for each document, in their order.

    Raises:
        ValueError: if the model returns another number of scores than it was given pairs, or NaN.
    """
    # Title and text as one string: not every model knows titles, and ours joins them in the same way.
    pairs = [(collection.queries[query], document_text(collection.documents[document])) for document in documents]
    scores = [float(score) for score in model.predict(pairs, **(predict_options or {}))] if pairs else []
    if len(scores) != len(pairs):
        raise ValueError(f"{type(model).__name__} was given {len(pairs)} pairs and returned {len(scores)} scores.")
    for document, score in zip(documents, scores, strict=True):
        if math.isnan(score):
            raise ValueError(f"{collection.name}: the score of query {query!r} and document {document!r} is NaN.")
    return scores


def by_score(documents: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Sort documents by score, best first; equal scores keep the given order."""
    return [documents[index] for index in sorted(range(len(documents)), key=lambda index: -scores[index])]


def _load(name: str | os.PathLike[str]) -> Reranker:
    from ..checkpoints.loading import default_device, load_model

    return load_model(name, device=default_device())


def _min_max(scores: Sequence[float]) -> list[float]:
    """Scale scores to [0, 1] as `min_max`; 0 where one is missing (-inf)."""
    finite = [score for score in scores if math.isfinite(score)]
    scaled = iter(min_max(finite) if finite else [])
    return [next(scaled) if math.isfinite(score) else 0.0 for score in scores]
