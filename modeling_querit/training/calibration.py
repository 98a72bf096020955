"""Teachers' scores as labels: each teacher's scale is brought to [0, 1], and several are averaged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import write_json

METHODS = ("quantile", "sigmoid", "rank", "none")
# Of "quantile": the shares of scores that are clipped at either end; single outliers must not set the scale.
_CLIPPED = 0.01
# Of "rank": points of the distribution that are kept.
_POINTS = 101


@dataclass(frozen=True)
class Calibration:
    """How the scores of one teacher become labels in [0, 1]: piecewise linear between points, or a sigmoid.

    Args:
        method: `quantile`: linear from the 1st to the 99th percentile, clipped. `sigmoid`: for logits. `rank`: the
            share of scores below, so that labels are spread evenly. `none`: scores are in [0, 1] as they are.
        scores, labels: The points of `quantile` and `rank`, scores ascending.

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
    def fit(cls, scores: Sequence[float], method: str = "quantile") -> Calibration:
        """The calibration of a teacher that gave these scores.

        Raises:
            ValueError: if there is no finite score, the method is unknown, or `none` is asked for scores beyond [0, 1].
        """
        if method not in METHODS:
            raise ValueError(f"calibration is {method!r}: choose from {', '.join(METHODS)}.")
        known = np.asarray(scores, dtype=np.float64)
        known = known[np.isfinite(known)]
        if not len(known):
            raise ValueError("There are no finite scores to calibrate by.")
        if method == "none" and not 0 <= known.min() <= known.max() <= 1:
            raise ValueError(
                f"calibration is 'none', but scores go from {known.min():.4g} to {known.max():.4g}: labels are in "
                "[0, 1]; choose quantile, sigmoid or rank."
            )
        shares = {"quantile": np.array([_CLIPPED, 1 - _CLIPPED]), "rank": np.linspace(0, 1, _POINTS)}.get(method)
        if shares is None:
            return cls(method)
        points = np.quantile(known, shares)
        if method == "quantile":
            if points[0] == points[-1]:
                # A score that few documents have may be all that tells them apart.
                points = np.array([known.min(), known.max()])
            return cls(method, tuple(points.tolist()), (0.0, 1.0))
        # Scores that many share stand for the middle of their ranks.
        levels = np.unique(points)
        middles = [float(shares[points == level].mean()) for level in levels]
        return cls(method, tuple(levels.tolist()), tuple(middles))

    def apply(self, scores: Sequence[float]) -> np.ndarray:
        """Labels in [0, 1], float64; NaN where the score is NaN. Where all scores were one, 0.5."""
        values = np.asarray(scores, dtype=np.float64)
        if self.method == "none":
            return values
        if self.method == "sigmoid":
            return 0.5 * (1 + np.tanh(values / 2))
        if self.scores[0] == self.scores[-1]:
            return np.where(np.isnan(values), np.nan, 0.5)
        return np.interp(values, self.scores, self.labels)


@dataclass(frozen=True)
class Teachers:
    """Calibrations and weights of the teachers of a run.

    Args:
        calibrations: By name.
        weights: By name; a label is the weighted mean of those of the teachers that scored the document.

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
        scores: Iterable[Mapping[str, Sequence[float]]],
        weights: Mapping[str, float] | None = None,
        methods: Mapping[str, str] | str = "quantile",
    ) -> Teachers:
        """Calibrate by the `scores` of training rows.

        Args:
            scores: Of each row, each teacher's scores.
            weights: Of the teachers to use; all of them, alike, by default.
            methods: One for all, or by teacher; `quantile` where it is not said.

        Raises:
            ValueError: if a teacher in `weights` scored nothing, or a weight is not above 0.
        """
        by_teacher: dict[str, list[float]] = {}
        for row in scores:
            for name, values in row.items():
                by_teacher.setdefault(name, []).extend(value for value in values if value is not None)
        weights = dict.fromkeys(by_teacher, 1.0) if weights is None else dict(weights)
        for name, weight in weights.items():
            if name not in by_teacher:
                known = ", ".join(sorted(by_teacher)) or "none"
                raise ValueError(f"No row has scores of teacher {name!r}; there are: {known}.")
            if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"The weight of teacher {name!r} is {weight}: it has to be above 0.")
        if not isinstance(methods, str) and (unknown := sorted(methods.keys() - weights.keys())):
            raise ValueError(f"calibration names {unknown[0]!r}, which is none of the teachers: {', '.join(weights)}.")
        of = (lambda name: methods) if isinstance(methods, str) else (lambda name: methods.get(name, "quantile"))
        return cls({name: Calibration.fit(by_teacher[name], of(name)) for name in weights}, weights)

    def labels(self, scores: Mapping[str, Sequence[float | None]]) -> list[float]:
        """A label in [0, 1] for each document of a row; NaN for one that no teacher scored."""
        count = max(len(values) for values in scores.values() if values is not None)
        total, weight = np.zeros(count), np.zeros(count)
        for name, calibration in self.calibrations.items():
            if scores.get(name) is not None:
                # None, in an array of floats, is NaN.
                labels = calibration.apply(np.array(scores[name], dtype=np.float64))
                total += self.weights[name] * np.nan_to_num(labels)
                weight += self.weights[name] * ~np.isnan(labels)
        return np.divide(total, weight, out=np.full(count, np.nan), where=weight > 0).tolist()

    def save(self, path: str | os.PathLike) -> None:
        """Write them as JSON."""
        found = {name: {"weight": self.weights[name], **asdict(each)} for name, each in self.calibrations.items()}
        write_json(found, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Teachers:
        """Read what `save` wrote."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        weights = {name: each.pop("weight") for name, each in found.items()}
        calibrations = {
            name: Calibration(each["method"], tuple(each["scores"]), tuple(each["labels"]))
            for name, each in found.items()
        }
        return cls(calibrations, weights)
