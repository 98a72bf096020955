"""Labels from teachers: scores on any scale are calibrated to [0, 1], and several teachers are averaged.

To add a calibration: give it an entry in `METHODS`, with a function that fits it to a teacher's scores and one that
applies it. The settings of `querit train` and `Teachers` follow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from ..files import read_json, write_json

# Share of scores that "quantile" clips at either end: single outliers must not set the scale.
_CLIPPED_SHARE = 0.01
# Points of the distribution function that "rank" stores.
_RANK_POINTS = 101
_DEFAULT_METHOD = "quantile"

Points = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Calibration:
    """How the scores of one teacher become labels in [0, 1].

    Args:
        method: Key of `METHODS`. `quantile`: linear from the 1st to the 99th percentile, clipped. `sigmoid`: logistic
            function, for logits. `rank`: share of the scores below, so that labels are spread evenly. `none`: scores
            are in [0, 1] already.
        scores: Scores between which `quantile` and `rank` interpolate, ascending.
        labels: Labels at these scores.

    Example:
        ```python
        >>> Calibration.fit([0.0, 5.0, 10.0], "quantile").apply([5.0])
        array([0.5])
        ```
    """

    method: str
    scores: tuple[float, ...] = ()
    labels: tuple[float, ...] = ()

    @classmethod
    def fit(cls, scores: Sequence[float], method: str = _DEFAULT_METHOD) -> Calibration:
        """Calibrate a teacher by the scores that it gave.

        Args:
            scores: Scores of the teacher; NaN and infinite ones are left out.
            method: Key of `METHODS`.

        Raises:
            ValueError: if there is no finite score, the method is unknown, or `none` is asked for scores beyond [0, 1].
        """
        if method not in METHODS:
            raise ValueError(f"calibration is {method!r}: choose from {', '.join(METHODS)}.")
        values = np.asarray(scores, dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            raise ValueError("There are no finite scores to calibrate by.")
        return cls(method, *METHODS[method].fit(values))

    def apply(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Turn scores into labels.

        Args:
            scores: Scores of the same teacher, (documents,); NaN where unknown.

        Returns:
            (documents,), float64, in [0, 1]; NaN where the score is NaN, 0.5 if all fitted scores were equal.
        """
        return METHODS[self.method].apply(np.asarray(scores, dtype=np.float64), self)


class Method(NamedTuple):
    """An entry of `METHODS`.

    Args:
        fit: Function from finite scores, (documents,), to the scores and labels to interpolate between, if any.
        apply: Function from scores, (documents,), and the fitted calibration to labels.
    """

    fit: Callable[[np.ndarray], Points]
    apply: Callable[[np.ndarray, Calibration], np.ndarray]


def _fit_quantile(scores: np.ndarray) -> Points:
    low, high = np.quantile(scores, [_CLIPPED_SHARE, 1 - _CLIPPED_SHARE])
    if low == high:
        # Only scores outside of these percentiles tell documents apart.
        low, high = scores.min(), scores.max()
    return (float(low), float(high)), (0.0, 1.0)


def _fit_rank(scores: np.ndarray) -> Points:
    shares = np.linspace(0, 1, _RANK_POINTS)
    points = np.quantile(scores, shares)
    # A score that many documents share gets the mean of their ranks.
    levels = np.unique(points)
    labels = [float(shares[points == level].mean()) for level in levels]
    return tuple(levels.tolist()), tuple(labels)


def _fit_none(scores: np.ndarray) -> Points:
    if not 0 <= scores.min() <= scores.max() <= 1:
        raise ValueError(
            f"calibration is 'none', but scores go from {scores.min():.4g} to {scores.max():.4g}, and labels are in "
            "[0, 1]: choose quantile, sigmoid or rank."
        )
    return (), ()


def _interpolate(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    if calibration.scores[0] == calibration.scores[-1]:
        return np.where(np.isnan(scores), np.nan, 0.5)
    return np.interp(scores, calibration.scores, calibration.labels)


METHODS = {
    "quantile": Method(_fit_quantile, _interpolate),
    "sigmoid": Method(lambda scores: ((), ()), lambda scores, _: 0.5 * (1 + np.tanh(scores / 2))),
    "rank": Method(_fit_rank, _interpolate),
    "none": Method(_fit_none, lambda scores, _: scores),
}


@dataclass(frozen=True)
class Teachers:
    """Calibrations and weights of the teachers of a run.

    Args:
        calibrations: Calibrations by name of the teacher.
        weights: Weights by name; a label is the weighted mean over the teachers that scored the document.

    Example:
        ```python
        >>> teachers = Teachers.fit([{"bm25": [3.0, 9.0], "nli": [0.2, 0.4]}], methods={"nli": "none"})
        >>> teachers.labels({"bm25": [3.0, 9.0], "nli": [0.2, 0.4]})
        [0.1, 0.7]
        ```
    """

    calibrations: dict[str, Calibration]
    weights: dict[str, float]

    @classmethod
    def fit(
        cls,
        scores: Iterable[Mapping[str, Sequence[float | None]]],
        weights: Mapping[str, float] | None = None,
        methods: Mapping[str, str] | str = _DEFAULT_METHOD,
    ) -> Teachers:
        """Calibrate teachers by the `scores` of training rows.

        Args:
            scores: Scores of each row, by name of the teacher.
            weights: Weights of the teachers to use; by default all of them, with equal weights.
            methods: One key of `METHODS` for all teachers, or keys by name; `quantile` for a teacher without one.

        Raises:
            ValueError: if a teacher in `weights` scored nothing, a weight is not above 0, or `methods` names a teacher
                that is not used.
        """
        by_teacher: dict[str, list[float]] = {}
        for row_scores in scores:
            for name, values in row_scores.items():
                by_teacher.setdefault(name, []).extend(value for value in values if value is not None)
        weights = dict.fromkeys(by_teacher, 1.0) if weights is None else dict(weights)
        for name, weight in weights.items():
            if name not in by_teacher:
                known = ", ".join(sorted(by_teacher)) or "none"
                raise ValueError(f"No row has scores of teacher {name!r}; there are: {known}.")
            if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"The weight of teacher {name!r} is {weight}: it has to be above 0.")
        by_name = dict.fromkeys(weights, methods) if isinstance(methods, str) else methods
        if unknown := sorted(by_name.keys() - weights.keys()):
            raise ValueError(f"calibration names {unknown[0]!r}, but the teachers are {', '.join(weights)}.")
        calibrations = {name: Calibration.fit(by_teacher[name], by_name.get(name, _DEFAULT_METHOD)) for name in weights}
        return cls(calibrations, weights)

    def labels(self, scores: Mapping[str, Sequence[float | None] | None]) -> list[float]:
        """Return the soft labels of the documents of a row.

        Args:
            scores: Scores of the documents by name of the teacher; None where it was not asked.

        Returns:
            One label in [0, 1] a document; NaN for a document that no teacher scored.
        """
        count = max(len(values) for values in scores.values() if values is not None)
        weighted_labels, weights = np.zeros(count), np.zeros(count)  # (documents,)
        for name, calibration in self.calibrations.items():
            teacher_scores = scores.get(name)
            if teacher_scores is not None:
                # numpy makes NaN of None.
                labels = calibration.apply(np.array(teacher_scores, dtype=np.float64))
                weighted_labels += self.weights[name] * np.nan_to_num(labels)
                weights += self.weights[name] * ~np.isnan(labels)
        return np.divide(weighted_labels, weights, out=np.full(count, np.nan), where=weights > 0).tolist()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write calibrations and weights as JSON."""
        entries = {
            name: {"weight": self.weights[name], **asdict(calibration)}
            for name, calibration in self.calibrations.items()
        }
        write_json(entries, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Teachers:
        """Read what `save` wrote."""
        entries = read_json(path)
        calibrations = {
            name: Calibration(entry["method"], tuple(entry["scores"]), tuple(entry["labels"]))
            for name, entry in entries.items()
        }
        return cls(calibrations, {name: entry["weight"] for name, entry in entries.items()})
