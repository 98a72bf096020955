import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, zscore

from modeling_querit.retrieval.fusion import NORMALIZATIONS, min_max, reciprocal_ranks, weighted_sum, z_score

scores = st.lists(st.integers(-1000, 1000).map(lambda value: value / 8), min_size=1, max_size=20)


@given(scores)
def test_normalizations_are_those_of_scipy(values):
    spread = np.ptp(values)
    assert min_max(values) == pytest.approx((np.array(values) - min(values)) / spread if spread else [0] * len(values))
    assert z_score(values) == pytest.approx(zscore(values) if spread else [0] * len(values), abs=1e-9)
    assert reciprocal_ranks(values) == pytest.approx(1 / (60 + rankdata(-np.array(values), "ordinal")))


def test_the_largest_scores_do_not_overflow():
    largest = [-1.7e308, 1.7e308, 1.7e308]
    assert min_max(largest) == [0.0, 1.0, 1.0]
    assert z_score(largest) == pytest.approx(zscore([-1, 1, 1]))


@given(scores, st.sampled_from(sorted(NORMALIZATIONS)), st.randoms(use_true_random=False))
def test_a_weight_of_one_is_the_first_stage_and_of_zero_the_reranker(first, normalization, rng):
    second = rng.sample(first, len(first))
    assert weighted_sum(first, second, 1, normalization) == NORMALIZATIONS[normalization](first)
    assert weighted_sum(first, second, 0, normalization) == NORMALIZATIONS[normalization](second)


def test_weights_are_shares():
    assert weighted_sum([12.0, 8.0], [-0.5, 0.5], weight=0.25) == [0.25, 0.75]
    assert weighted_sum([12.0, 8.0], [-0.5, 0.5], 0.25, "rrf") == pytest.approx(
        [0.25 / 61 + 0.75 / 62, 0.25 / 62 + 0.75 / 61]
    )
