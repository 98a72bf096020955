"""Calibration of scores: the probability that a document with a score is relevant, from numbers in the config."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Scores as close to -1 and 1 as float32 can be; beyond, the logit difference is infinite.
_LARGEST_SCORE = 1 - 2**-25
_KEYS = {"platt": ("slope", "intercept"), "isotonic": ("scores", "probabilities")}


def logit_difference(score: float) -> float:
    """Return z1 - z0 of a score in [-1, 1], within about [-18, 18]."""
    return 2 * math.atanh(max(-_LARGEST_SCORE, min(_LARGEST_SCORE, score)))


def sigmoid(value: float) -> float:
    """Return `1 / (1 + exp(-value))`."""
    return 0.5 * (1 + math.tanh(value / 2))


def probability_function(calibration: Mapping[str, Any]) -> Callable[[float], float]:
    """Return the function that turns scores in [-1, 1] into probabilities of relevance; it never falls.

    Args:
        calibration: `{"method": "platt", "slope", "intercept"}`: the logistic function of `slope * (z1 - z0) +
            intercept` (Platt 1999); or `{"method": "isotonic", "scores", "probabilities"}`: linear between these
            points, constant beyond (Zadrozny and Elkan, KDD 2002).

    Raises:
        ValueError: if it has another form.

    Example:
        ```python
        >>> probability_function({"method": "platt", "slope": 1.0, "intercept": 0.0})(0.5)
        0.75
        ```
    """
    check_calibration(calibration)
    if calibration["method"] == "platt":
        slope, intercept = calibration["slope"], calibration["intercept"]
        return lambda score: sigmoid(slope * logit_difference(score) + intercept)
    points, values = calibration["scores"], calibration["probabilities"]

    def interpolate(score: float) -> float:
        above = bisect_right(points, score)
        if above in (0, len(points)):
            return values[max(above - 1, 0)]
        share = (score - points[above - 1]) / (points[above] - points[above - 1])
        return values[above - 1] + share * (values[above] - values[above - 1])

    return interpolate


def probability_of(config: PreTrainedConfig) -> Callable[[float], float]:
    """Return the `probability_function` of a model.

    Raises:
        ValueError: if the model is not calibrated.
    """
    calibration = getattr(config, "calibration", None)
    if calibration is None:
        raise ValueError(
            "This model is not calibrated, so its scores say nothing about probabilities: run querit calibrate on its "
            "folder, with queries whose relevant documents are known."
        )
    return probability_function(calibration)


def check_calibration(calibration: Any) -> None:
    """Check what a config holds as `calibration`.

    Raises:
        ValueError: if it is not as `probability_function` takes it.
    """
    if not isinstance(calibration, Mapping):
        raise ValueError(f"calibration is {calibration!r}, not an object with a method.")
    method = calibration.get("method")
    if not isinstance(method, str) or method not in _KEYS:
        raise ValueError(f"calibration has the method {method!r}, not platt or isotonic.")
    values: list[Any] = [calibration.get(key) for key in _KEYS[method]]
    if method == "platt":
        if not all(map(_is_number, values)) or not values[0] > 0:
            raise ValueError("calibration needs a slope above 0 and an intercept.")
        return
    scores, probabilities = values
    if not (isinstance(scores, list) and isinstance(probabilities, list) and len(scores) == len(probabilities) > 0):
        raise ValueError("calibration needs scores and probabilities, two lists of the same length.")
    if not all(map(_is_number, [*scores, *probabilities])) or not 0 <= min(probabilities) <= max(probabilities) <= 1:
        raise ValueError("calibration needs scores that are numbers, and probabilities in [0, 1].")
    is_rising = all(low < high for low, high in pairwise(scores))
    if not is_rising or sorted(probabilities) != probabilities:
        raise ValueError("calibration needs scores that rise, and probabilities that do not fall.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
