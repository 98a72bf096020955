"""Ranking measures by pytrec_eval, which is trec_eval's own code: the one place where rankings are measured.

`metrics/reranking/`, the module for Hugging Face `evaluate`, holds a copy of this file, since it must work without this
package: it imports nothing but pytrec_eval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import pytrec_eval

# Query id -> document id -> grade, a whole number; above 0 is relevant. A document without a grade is not relevant.
Qrels = Mapping[str, Mapping[str, int]]
# Query id -> document id -> score, or document ids, best first.
Run = Mapping[str, Mapping[str, float] | Sequence[str]]

DEFAULT_MEASURES = ("ndcg_at_10", "mrr_at_10", "map", "precision_at_10", "recall_at_100")
_NAME = re.compile(r"(ndcg|mrr|map|precision|recall)_at_([1-9][0-9]{0,5})|map")
_TREC_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "precision": "P", "recall": "recall"}
# trec_eval allocates memory for every grade up to the highest.
_MAX_GRADE = 1_000_000
# Soft labels are rounded to this unit.
_GRADES_PER_LABEL = 10_000


def measure(
    qrels: Qrels, run: Run, measures: Iterable[str] = DEFAULT_MEASURES, *, require_all: bool = False
) -> dict[str, dict[str, float]]:
    """Compute measures of each query that has a ranking and a relevant document (a grade above 0).

    Documents without a grade count as not relevant. Equal scores are ordered as trec_eval orders them: by document id,
    descending, after rounding to float32. Lists of ids have no equal scores: their order is the ranking. trec_eval's
    own averages count queries without a relevant document as 0; here they are left out, since no order of their
    documents is better than another.

    Args:
        qrels: Query id -> document id -> grade.
        run: Query id -> document id -> score, or document ids, best first.
        measures: Names: `ndcg_at_K`, `mrr_at_K`, `map`, `map_at_K`, `precision_at_K`, `recall_at_K`.
        require_all: Whether every query with a relevant document must have a ranking.

    Returns:
        Measure -> query id -> value in [0, 1].

    Raises:
        ValueError: if a measure is unknown, a score is not a finite number, a grade not a whole one, a ranking has a
            document twice, or, with `require_all`, a query has no ranking or none has a relevant document.

    Example:
        ```python
        >>> measure({"q": {"a": 1}}, {"q": {"a": 0.2, "b": 0.7}}, ["ndcg_at_10", "mrr_at_10"])
        {'ndcg_at_10': {'q': 0.6309297535714575}, 'mrr_at_10': {'q': 0.5}}
        ```
    """
    trec_names = {name: _trec_name(name) for name in measures}
    judged = {
        query: {document: _checked_grade(grade, query, document) for document, grade in grades.items()}
        for query, grades in qrels.items()
    }
    judged = {query: grades for query, grades in judged.items() if max(grades.values(), default=0) > 0}
    if require_all:
        _check_complete(judged, run)
    scored = {query: _scored(query, ranking) for query, ranking in run.items()}
    scored = {query: ranking for query, ranking in scored.items() if query in judged}
    # trec_eval leaves out a query whose ranking is empty: its value is 0.
    values = pytrec_eval.RelevanceEvaluator(judged, set(trec_names.values())).evaluate(scored)
    return {
        name: {query: _value(name, values.get(query, {}).get(trec_name.replace(".", "_"), 0.0)) for query in scored}
        for name, trec_name in trec_names.items()
    }


def measure_rows(
    scores: Iterable[float],
    labels: Iterable[float],
    query_ids: Iterable[str],
    measures: Iterable[str] = DEFAULT_MEASURES,
) -> dict[str, dict[str, float]]:
    """Compute measures of pairs, as `measure` does: one score, label and query id for each pair, in any order.

    Equal scores are ordered least relevant first, whatever the order of the rows, so that ties earn nothing and the
    given order, which may be that of the labels, does not matter. Labels may be soft (not whole); they are rounded to
    1/10,000, or to a millionth of the highest one, but never to 0: every label above 0 is relevant.

    Args:
        scores: Scores of the pairs, higher is more relevant.
        labels: Labels of the pairs.
        query_ids: Ids of the pairs' queries.
        measures: Names, as in `measure`.

    Returns:
        Measure -> query id -> value in [0, 1], of the queries with a label above 0.

    Raises:
        ValueError: if there are not equally many scores, labels and query ids, or one is not a finite number.

    Example:
        ```python
        >>> measure_rows([0.9, 0.1], [0, 1], ["q", "q"], ["mrr_at_10"])
        {'mrr_at_10': {'q': 0.5}}
        ```
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for query, score, label in zip(query_ids, scores, labels, strict=True):
        if not math.isfinite(score) or not math.isfinite(label):
            number = len(pairs.get(query, ()))
            raise ValueError(f"Query {query!r}, pair {number}: score {score} and label {label}: both must be finite.")
        pairs.setdefault(query, []).append((score, label))
    highest = max((label for pairs_of_query in pairs.values() for _, label in pairs_of_query), default=0)
    # trec_eval wants whole grades; their unit does not matter to any measure.
    unit = min(_GRADES_PER_LABEL, _MAX_GRADE / highest) if highest > 0 else 1
    qrels: dict[str, dict[str, int]] = {}
    rankings: dict[str, list[str]] = {}
    for query, pairs_of_query in pairs.items():
        grades = [max(round(label * unit), int(label > 0)) for _, label in pairs_of_query]
        order = sorted(range(len(grades)), key=lambda pair: (-pairs_of_query[pair][0], grades[pair]))
        rankings[query] = [str(pair) for pair in order]
        qrels[query] = {str(pair): grade for pair, grade in enumerate(grades)}
    return measure(qrels, rankings, measures)


def mean(values: Mapping[str, float]) -> float:
    """Return the mean over queries, or NaN if there are none."""
    return math.fsum(values.values()) / len(values) if values else math.nan


def _trec_name(name: str) -> str:
    """Name of a measure for pytrec_eval, such as `ndcg_cut.10`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"There is no measure {name!r}: name ndcg_at_K, mrr_at_K, map, map_at_K, precision_at_K or recall_at_K."
        )
    kind, cutoff = match.groups()
    if kind is None:
        return "map"
    return "recip_rank" if kind == "mrr" else f"{_TREC_NAMES[kind]}.{cutoff}"


def _value(name: str, value: float) -> float:
    """Value of a measure; trec_eval's reciprocal rank has no cut-off, and counts as 0 below rank K."""
    if name.startswith("mrr_at_") and value and round(1 / value) > int(name.removeprefix("mrr_at_")):
        return 0.0
    return value


def _checked_grade(grade: float, query: str, document: str) -> int:
    if not math.isfinite(grade) or int(grade) != grade or grade > _MAX_GRADE:
        raise ValueError(
            f"Query {query!r}, document {document!r}: the grade {grade} is no whole number up to a million."
        )
    return int(grade)


def _scored(query: str, ranking: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Scores of a ranking: its own, or those that put the ids in their order."""
    if not isinstance(ranking, Mapping):
        if len(set(ranking)) != len(ranking):
            twice = next(document for number, document in enumerate(ranking) if document in ranking[:number])
            raise ValueError(f"The ranking of query {query!r} has document {twice!r} twice.")
        return {document: float(-rank) for rank, document in enumerate(ranking)}
    for document, score in ranking.items():
        if not math.isfinite(score):
            raise ValueError(f"Query {query!r}, document {document!r}: the score is {score}, not a finite number.")
    return dict(zip(ranking, map(float, ranking.values()), strict=True))


def _check_complete(judged: Mapping[str, object], run: Run) -> None:
    if not judged:
        raise ValueError("No query has a relevant document (a grade above 0), so nothing can be measured.")
    missing = [query for query in judged if query not in run]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(judged)} queries with a relevant document have no ranking, such as {missing[0]!r}"
            ": rank them, or remove their judgements."
        )
