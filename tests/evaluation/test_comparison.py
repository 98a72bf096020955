import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.evaluation.comparison import bootstrap_interval, p_value


def per_query(values):
    return {f"q{n}": value for n, value in enumerate(values)}


def test_interval_of_many_queries_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = bootstrap_interval(per_query(values))
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    assert bootstrap_interval(per_query(values)) == (low, high)


def test_a_lower_level_gives_a_narrower_interval():
    values = per_query([0.0, 0.25, 0.5, 0.75, 1.0])
    low, high = bootstrap_interval(values, level=0.5)
    wide_low, wide_high = bootstrap_interval(values)
    assert wide_low < low < 0.5 < high < wide_high


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25, 0.25]])
def test_interval_of_equal_values_is_a_point(values):
    assert bootstrap_interval(per_query(values)) == (0.25, 0.25)


# Sums of eighths are exact.
eighths = st.integers(0, 8).map(lambda n: n / 8)


@given(st.lists(st.tuples(eighths, eighths), min_size=2, max_size=7))
def test_p_value_is_the_share_of_all_sign_flips(pairs):
    first, second = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    flips = itertools.product((1, -1), repeat=len(pairs))
    sums = [abs(sum(sign * each for sign, each in zip(signs, differences, strict=True))) for signs in flips]
    expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    assert p_value(per_query(first), per_query(second)) == pytest.approx(expected)
    assert p_value(per_query(second), per_query(first)) == pytest.approx(expected)


def test_p_value_of_many_queries():
    rng = np.random.default_rng(0)
    second = rng.uniform(0, 1, 200)
    noise = rng.normal(0, 0.1, 200)
    shifted = second + noise - noise.mean() + 0.014
    # z = 0.014 / (0.1 / sqrt(200)) is about 2, so the p-value is about 0.05.
    found = p_value(per_query(shifted), per_query(second), seed=3)
    assert found == pytest.approx(0.05, abs=0.03)
    assert p_value(per_query(shifted), per_query(second), seed=3) == found
    assert p_value(per_query(second + 0.1), per_query(second)) < 0.001


def test_the_order_of_queries_does_not_matter():
    first, second = per_query([0.5, 0.25, 1.0, 0.75]), per_query([0.0, 0.5, 0.25, 0.5])
    assert p_value(dict(reversed(first.items())), second) == p_value(first, second)


@pytest.mark.parametrize(("first", "second"), [([], []), ([0.5], [0.1]), ([0.1, 0.7], [0.1, 0.7])])
def test_equal_or_too_few_queries_have_p_value_1(first, second):
    assert p_value(per_query(first), per_query(second)) == 1.0


def test_per_query_different_queries():
    with pytest.raises(ValueError, match="different queries"):
        p_value({"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5})
