"""Statistics over queries: confidence intervals, and whether two systems differ by more than chance."""

from __future__ import annotations

import numpy as np

from .metrics import PerQuery, mean

_RESAMPLES = 9_999
# Values that are resampled at once: a bound on memory.
_BATCH_VALUES = 10_000_000


def bootstrap_interval(values: PerQuery, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Compute the confidence interval of a mean over queries, by the percentile bootstrap.

    Source: Sakai, SIGIR 2006.

    Args:
        values: Query id -> value of a metric.
        seed: Seed of the resamples.
        level: Share of resampled means that lie in the interval.

    Returns:
        Lower and upper end; both are the mean if there are fewer than two different values.

    Example:
        ```python
        >>> bootstrap_interval({"a": 0.5, "b": 0.5, "c": 0.5})
        (0.5, 0.5)
        ```
    """
    from scipy.stats import bootstrap

    sample = np.array([values[query] for query in sorted(values)])
    if len(np.unique(sample)) < 2:
        return mean(values), mean(values)
    interval = bootstrap(
        (sample,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_VALUES // len(sample)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def p_value(first: PerQuery, second: PerQuery, seed: int = 0) -> float:
    """Compute the two-sided p-value of a difference of two means over queries, by a paired randomization test.

    Source: Smucker, Allan and Carterette, CIKM 2007.

    Example:
        ```python
        >>> p_value({"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.2})
        1.0
        ```
    """
    from scipy.stats import permutation_test

    if first.keys() != second.keys():
        raise ValueError("The two systems were measured on different queries, which cannot be compared.")
    differences = np.array([first[query] - second[query] for query in sorted(first)])
    if len(differences) < 2 or not differences.any():
        return 1.0
    result = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, rng=np.random.default_rng(seed)
    )
    return float(result.pvalue)
