"""`querit calibrate`: from a reranker's scores to probabilities of relevance, fitted on relevance judgements."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration_querit import logit_difference, probability_function
from ..checkpoints.convert import convert_to_querit
from ..configuration_querit import QueritConfig
from ..evaluation.evaluate import Candidates, first_stage_candidates, score_candidates
from ..files import atomic_write, check_destination, read_json
from ..modeling_querit import QueritForSequenceRanking
from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection, Source
from .data import read_rows

# Bins of the expected calibration error, of equal width.
ECE_BINS = 15
_MAX_FOLDS = 5
_SEED = 0


@dataclass(frozen=True)
class JudgedSources:
    """Where judged pairs come from.

    Args:
        collections: Splits of collections in the BEIR layout, `FOLDER:SPLIT`.
        rows: Files of rows with `query`, `documents` and `labels`.
        depth: Candidates per query, from BM25, if the collection lists none.
        judged_only: Whether only judged documents are used; otherwise all candidates are, and unjudged ones count as
            not relevant.
        relevant_from: Lowest grade or label of a relevant document.

    Raises:
        ValueError: if there is no source.
    """

    collections: Sequence[str] = ()
    rows: Sequence[str] = ()
    depth: int = 100
    judged_only: bool = False
    relevant_from: float = 1.0

    def __post_init__(self) -> None:
        if not self.collections and not self.rows:
            raise ValueError("There is nothing to calibrate on: give --collection FOLDER:SPLIT, or --rows FILE.")
        for source in map(Source.parse, self.collections):
            source.check()
        for path in self.rows:
            if not Path(path).is_file():
                raise FileNotFoundError(f"There is no file {path}.")

    def score(self, model: QueritForSequenceRanking, max_length: int | None = None) -> JudgedScores:
        """Score all pairs with a model."""
        scores: list[float] = []
        is_relevant: list[bool] = []
        queries: list[int] = []

        def add(values: Sequence[float], grades: Sequence[float]) -> None:
            queries.extend([queries[-1] + 1 if queries else 0] * len(values))
            scores.extend(values)
            is_relevant.extend(grade >= self.relevant_from for grade in grades)

        options: dict[str, Any] = {"max_length": max_length, "show_progress_bar": False}
        for source in map(Source.parse, self.collections):
            collection = source.load()
            candidates = self._candidates(collection)
            by_query = score_candidates(model, collection, candidates, options)
            for query, hits in candidates.items():
                # Below every grade: nobody has judged it.
                grades = collection.qrels.get(query, {})
                add(by_query[query], [grades.get(document, -np.inf) for document in hits])
        for path in self.rows:
            for row in read_rows(path):
                if (labels := row.get("labels")) is None:
                    raise ValueError(f"{path} has a row without labels: calibrate on judgements.")
                pairs = [(row["query"], document) for document in row["documents"]]
                add(model.predict(pairs, row.get("instruction"), **options).tolist(), labels)
        return JudgedScores(np.array(scores), np.array(is_relevant, dtype=bool), np.array(queries))

    def _candidates(self, collection: Collection) -> Candidates:
        queries = sorted(collection.queries)
        if not self.judged_only:
            return first_stage_candidates(collection, BM25(collection.documents), queries, self.depth)
        return {
            query: {document: 0.0 for document in collection.qrels[query] if document in collection.documents}
            for query in queries
        }


@dataclass(frozen=True)
class JudgedScores:
    """Scores of judged pairs.

    Args:
        scores: Scores in [-1, 1], (pairs,).
        is_relevant: Whether the document was judged relevant, (pairs,).
        queries: Number of the query, (pairs,).
    """

    scores: np.ndarray
    is_relevant: np.ndarray
    queries: np.ndarray

    def part(self, mask: np.ndarray) -> JudgedScores:
        """Return the pairs of a mask, (pairs,)."""
        return JudgedScores(self.scores[mask], self.is_relevant[mask], self.queries[mask])


def fit_platt(judged: JudgedScores) -> dict[str, Any]:
    """Fit a logistic function of the logit difference, with the smoothed targets of Platt (1999).

    Source: Platt, "Probabilistic outputs for support vector machines", section 2.2; its targets, just inside [0, 1],
    keep the slope finite where scores separate the classes.
    """
    from sklearn.linear_model import LogisticRegression

    logits = np.array([[logit_difference(score)] for score in judged.scores])  # (pairs, 1)
    positives = int(judged.is_relevant.sum())
    negatives = len(judged.scores) - positives
    targets = np.where(judged.is_relevant, (positives + 1) / (positives + 2), 1 / (negatives + 2))  # (pairs,)
    classes = np.repeat([1, 0], len(targets))
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(np.concatenate([logits, logits]), classes, sample_weight=np.concatenate([targets, 1 - targets]))
    return {"method": "platt", "slope": float(model.coef_[0, 0]), "intercept": float(model.intercept_[0])}


def fit_isotonic(judged: JudgedScores) -> dict[str, Any]:
    """Fit the best function that never falls (Zadrozny and Elkan, KDD 2002), as the points where it bends."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0, y_max=1).fit(judged.scores, judged.is_relevant.astype(float))
    return {
        "method": "isotonic",
        "scores": model.X_thresholds_.tolist(),
        "probabilities": model.y_thresholds_.tolist(),
    }


METHODS: dict[str, Callable[[JudgedScores], dict[str, Any]]] = {"platt": fit_platt, "isotonic": fit_isotonic}


def fit(judged: JudgedScores, method: str) -> dict[str, Any]:
    """Fit a calibration, as the config of a model holds it.

    Args:
        judged: Scores and judgements.
        method: Key of `METHODS`.

    Raises:
        ValueError: if all documents are relevant, or none is, or scores do not rise with relevance.
    """
    relevant = judged.is_relevant.sum()
    if not 0 < relevant < len(judged.scores):
        kind = "relevant" if relevant else "not relevant"
        raise ValueError(f"All {len(judged.scores)} documents are {kind}: calibration needs both kinds.")
    # Of a single score, Platt's slope would be arbitrary.
    calibration: dict[str, Any] = METHODS[method](judged) if len(np.unique(judged.scores)) > 1 else {"slope": 0}
    # A fall within a query is ranked wrongly, too: no calibration mends it.
    if calibration.get("slope", 1) <= 0 or len(set(calibration.get("probabilities", (0, 1)))) < 2:
        raise ValueError("Relevant documents do not score higher than others: such a model cannot be calibrated.")
    return calibration


def probabilities(calibration: Mapping[str, Any], scores: np.ndarray) -> np.ndarray:
    """Return the probabilities of scores, (pairs,), as `rank(..., as_probability=True)` does."""
    return np.array([*map(probability_function(calibration), scores.tolist())])


def expected_calibration_error(values: np.ndarray, is_relevant: np.ndarray, bins: int = ECE_BINS) -> float:
    """Compute the mean distance of probabilities from the share of relevant documents, in bins of equal width.

    Source: Guo et al., ICML 2017, equation 3, for the probability of relevance.

    Args:
        values: Probabilities, (pairs,).
        is_relevant: True relevance of each pair, bool, (pairs,).
        bins: Number of bins.

    Example:
        ```python
        >>> expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False]))
        0.4
        ```
    """
    indices = np.minimum((values * bins).astype(int), bins - 1)
    # The weight of a bin and the division by its count cancel out.
    gaps = np.bincount(indices, weights=values - is_relevant, minlength=bins)  # (bins,)
    return float(np.abs(gaps).sum() / len(values))


def held_out_probabilities(judged: JudgedScores, method: str) -> np.ndarray:
    """Calibrate each fold of the queries by the others: (pairs,).

    Raises:
        ValueError: if there are fewer than two queries, or the other folds have documents of one kind only.
    """
    from sklearn.model_selection import GroupKFold

    folds = min(_MAX_FOLDS, len(np.unique(judged.queries)))
    if folds < 2:
        raise ValueError("There is only one query: calibration is checked on queries that it was not fitted on.")
    values = np.empty(len(judged.scores))
    splitter = GroupKFold(folds, shuffle=True, random_state=_SEED)
    for fitted, held_out in splitter.split(judged.scores, groups=judged.queries):
        try:
            calibration = fit(judged.part(fitted), method)
        except ValueError as error:
            raise ValueError(f"{error} (Without one fifth of the queries: give more of them.)") from None
        values[held_out] = probabilities(calibration, judged.scores[held_out])
    return values


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration, and its errors measured by cross-validation over queries.

    Args:
        calibration: The calibration, fitted on all queries.
        queries: Number of queries.
        pairs: Number of pairs.
        share_relevant: Share of relevant documents.
        errors: Name -> expected calibration error and Brier score: `before` (p1 of the model as it is), and `after`.
    """

    calibration: Mapping[str, Any]
    queries: int
    pairs: int
    share_relevant: float
    errors: Mapping[str, tuple[float, float]]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [
            f"{self.queries:,} queries, {self.pairs:,} pairs, {self.share_relevant:.1%} relevant; "
            f"method {self.calibration['method']}",
            f"{'':<28}{'ECE':>8}{'Brier':>8}",
        ]
        names = {"before": "before (p1 of the model)", "after": "after (held-out queries)"}
        return lines + [f"{names[name]:<28}{ece:>8.4f}{brier:>8.4f}" for name, (ece, brier) in self.errors.items()]


def measure(judged: JudgedScores, method: str) -> CalibrationReport:
    """Fit a calibration, and measure it by cross-validation over queries.

    Args:
        judged: Scores and judgements.
        method: Key of `METHODS`.

    Raises:
        ValueError: if there are too few judgements, or of one kind only.
    """
    calibration = fit(judged, method)
    as_it_is = (judged.scores + 1) / 2
    systems = {"before": as_it_is, "after": held_out_probabilities(judged, method)}
    errors = {
        name: (
            expected_calibration_error(values, judged.is_relevant),
            float(np.square(values - judged.is_relevant).mean()),
        )
        for name, values in systems.items()
    }
    queries = len(np.unique(judged.queries))
    return CalibrationReport(calibration, queries, len(judged.scores), float(judged.is_relevant.mean()), errors)


def calibrate_model(
    name: str,
    sources: JudgedSources,
    method: str,
    output: Path | None,
    load: Callable[[], QueritForSequenceRanking],
    max_length: int | None = None,
) -> CalibrationReport:
    """Calibrate a model, and store the calibration in its config.

    Args:
        name: Folder of the model; any name of a model if there is an `output`.
        sources: Judged pairs.
        method: Key of `METHODS`.
        output: New folder, a copy of the model in Querit's layout; None: the config of the model itself is changed.
        load: Function that loads the model.
        max_length: Maximum number of tokens in a pair.

    Raises:
        OSError: if a file is missing or cannot be written.
        ValueError: if the model is not a folder in Querit's layout and there is no output, or it cannot be calibrated.
    """
    if output is None:
        _check_in_place(Path(name))
    else:
        check_destination(output)
    report = measure(sources.score(load(), max_length), method)
    folder = Path(name) if output is None else convert_to_querit(name, output)
    write_calibration(folder, report.calibration)
    return report


def _check_in_place(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != QueritConfig.model_type:
        raise ValueError(f"{folder} is not a folder in Querit's layout: name a new one, --output FOLDER.")


def write_calibration(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Store a calibration in the config of a folder."""
    path = folder / "config.json"
    config = read_json(path) | {"calibration": dict(calibration)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
