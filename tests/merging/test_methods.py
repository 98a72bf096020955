"""Factors of merge methods, against float64 formulas and mergekit's code."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_checkpoints import PARALLEL_COSINE, slow_gradient, slow_karcher, slow_linear, slow_slerp

from modeling_querit.merging.methods import (
    METHODS,
    gram_matrix,
    linear_mean,
    spherical_mean,
    task_arithmetic,
    weighted_sum,
)

SEEDS = st.integers(0, 10_000)
WEIGHTS = st.lists(st.floats(0.01, 1), min_size=2, max_size=5)
PLANE_VECTORS = arrays(np.float64, (2, 4), elements=st.floats(-10, 10))


def factors_of(vectors, weights, method=spherical_mean, **options):
    vectors, weights = np.asarray(vectors, np.float64), np.asarray(weights, np.float64)
    actual = method(torch.from_numpy(vectors @ vectors.T), torch.from_numpy(weights / weights.sum()), **options)
    assert actual.dtype == torch.float64
    return actual.numpy()


def merge(vectors, weights, method=spherical_mean, **options):
    return factors_of(vectors, weights, method, **options) @ np.asarray(vectors)


def in_a_cone(count, seed, length=20, spread=1.0):
    """Vectors of different lengths around a common direction."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=length) + spread * rng.normal(size=(count, length))
    return vectors * rng.uniform(0.5, 3, size=(count, 1))


def units(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Two vectors


@given(PLANE_VECTORS, st.floats(0, 1))
def test_two_vectors_are_merged_by_slerp(vectors, t):
    lengths = np.linalg.norm(vectors, axis=1)
    assume(lengths.min() > 1e-3)
    # At the threshold, rounding decides.
    assume(abs(abs(vectors[0] @ vectors[1] / lengths.prod()) - PARALLEL_COSINE) > 1e-9)
    np.testing.assert_allclose(merge(vectors, [1 - t, t]), slow_slerp(*vectors, t), rtol=0, atol=1e-8 * lengths.max())


@pytest.mark.parametrize("cosine", [0.9994, 0.99, 0.5, 0.0, -0.5, -0.99, -0.9994])
def test_slerp_holds_at_any_angle(cosine):
    vectors = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]])
    for t in np.linspace(0, 1, 11):
        np.testing.assert_allclose(merge(vectors, [1 - t, t]), slow_slerp(*vectors, t), rtol=0, atol=1e-12)


@given(SEEDS, st.floats(0, 1), st.floats(-1.0, 4.0))
def test_slerp_equals_that_of_mergekit(seed, t, spread):
    slerp = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    first, second = (torch.from_numpy(vector).float() for vector in in_a_cone(2, seed, spread=spread))
    cosine = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0)
    assume(abs(abs(cosine.item()) - PARALLEL_COSINE) > 1e-5)
    factors = spherical_mean(gram_matrix([first, second]), torch.tensor([1 - t, t], dtype=torch.float64))
    expected = slerp(torch.tensor([t]), first[None], second[None])[0]
    torch.testing.assert_close(weighted_sum([first.clone(), second], factors), expected, rtol=1e-5, atol=1e-5)


# Any number of vectors


@given(WEIGHTS, SEEDS)
def test_the_mean_is_stationary(weights, seed):
    vectors = units(in_a_cone(len(weights), seed))
    weights = np.array(weights) / sum(weights)
    mean = merge(vectors, weights)
    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-12)
    assert np.linalg.norm(slow_gradient(mean, vectors, weights)) < 1e-10


@given(WEIGHTS, SEEDS)
def test_no_nearby_point_is_better(weights, seed):
    vectors = units(in_a_cone(len(weights), seed))
    weights = np.array(weights) / sum(weights)
    mean = merge(vectors, weights)
    moved = units(mean + 0.05 * np.random.default_rng(seed).normal(size=(8, mean.size)))

    def cost(point):
        return weights @ np.arccos(np.clip(vectors @ point, -1, 1)) ** 2

    assert all(cost(mean) < cost(point) for point in moved)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_gradient_descent_ends_at_the_same_direction(count):
    for seed in range(5):
        vectors, weights = units(in_a_cone(count, seed)), np.arange(1, count + 1)
        np.testing.assert_allclose(merge(vectors, weights), slow_karcher(vectors, weights), rtol=0, atol=1e-10)


@given(WEIGHTS, SEEDS)
def test_the_direction_equals_that_of_mergekit(weights, seed):
    karcher = pytest.importorskip("mergekit.merge_methods.karcher").karcher_merge_tensors
    vectors = in_a_cone(len(weights), seed)
    tensors = [torch.from_numpy(vector) for vector in vectors]
    expected = karcher(tensors, [weight / sum(weights) for weight in weights], max_iter=200, tol=1e-9).numpy()
    actual = merge(units(vectors), weights)
    np.testing.assert_allclose(actual, expected / np.linalg.norm(expected), rtol=0, atol=1e-6)


@given(st.lists(st.floats(-1.2, 1.2), min_size=2, max_size=5, unique=True), SEEDS)
def test_on_one_circle_angles_are_averaged(angles, seed):
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assume((vectors @ vectors.T).min() < PARALLEL_COSINE - 1e-6)
    weights = np.random.default_rng(seed).uniform(0.1, 1, len(angles))
    angle = weights @ angles / weights.sum()
    np.testing.assert_allclose(merge(vectors, weights), [np.cos(angle), np.sin(angle)], rtol=0, atol=1e-9)


@given(WEIGHTS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_vectors_does_not_matter(weights, seed, random):
    vectors, weights = in_a_cone(len(weights), seed), np.array(weights)
    order = list(range(len(weights)))
    random.shuffle(order)
    expected = factors_of(vectors, weights)[order]
    np.testing.assert_allclose(factors_of(vectors[order], weights[order]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_dependent_vectors_does_not_matter(seed):
    """Three biases of two elements, exact in bfloat16."""
    rng = np.random.default_rng(seed)
    vectors, weights = rng.integers(-16, 17, (3, 2)) / 8 + 1 / 64, rng.uniform(0.1, 1, 3)
    actual = [merge(vectors[list(order)], weights[list(order)]) for order in itertools.permutations(range(3))]
    np.testing.assert_allclose(actual, [actual[0]] * 6, rtol=0, atol=1e-6)


def test_dot_products_do_not_overflow_in_float32():
    chunk = [torch.full((4,), 1e20), torch.full((4,), -1e20)]
    np.testing.assert_allclose(gram_matrix(chunk), [[4e40, -4e40], [-4e40, 4e40]], rtol=1e-6)


def test_a_vector_given_twice_counts_twice():
    first, second = in_a_cone(2, seed=0)
    actual = merge([first, second, first], [0.3, 0.4, 0.3])
    np.testing.assert_allclose(actual, slow_slerp(first, second, 0.4), rtol=0, atol=1e-10)


@given(WEIGHTS, SEEDS)
def test_lengths_do_not_change_factors(weights, seed):
    vectors = in_a_cone(len(weights), seed)
    lengths = np.random.default_rng(seed).uniform(1e-3, 1e3, size=(len(weights), 1))
    np.testing.assert_allclose(factors_of(vectors * lengths, weights), factors_of(vectors, weights), rtol=1e-8)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("method", [spherical_mean, linear_mean])
def test_a_vector_with_all_the_weight_is_the_result(count, method):
    vectors = in_a_cone(count, seed=count)
    for index in range(count):
        factors = factors_of(vectors, np.eye(count)[index], method)
        np.testing.assert_allclose(factors, np.eye(count)[index], rtol=0, atol=1e-15)
        # Exactly 0: not even the last bit of the others counts.
        assert not factors[np.arange(count) != index].any()


WITHOUT_WEIGHT = {
    "zero": np.array([0.0, 0, 0, 0]),
    "opposite to the first": np.array([-2.0, 0, 0, 0]),
}


@pytest.mark.parametrize("case", WITHOUT_WEIGHT)
def test_a_vector_without_weight_changes_nothing(case):
    vectors = np.array([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0], WITHOUT_WEIGHT[case]])
    actual = merge(vectors, [0.5, 0.5, 0])
    np.testing.assert_allclose(actual, slow_slerp(vectors[0], vectors[1], 0.5), rtol=0, atol=1e-12)


def test_a_single_vector_is_unchanged():
    assert factors_of([[3.0, 4.0]], [1]).tolist() == [1]


# Where angles are meaningless

DEGENERATE = {
    "parallel": [[1, 2, 3], [2, 4, 6]],
    "nearly parallel": [[1, 2, 3], [1, 2, 3.01]],
    "opposite": [[1, 2, 3], [-2, -4, -6]],
    "nearly opposite": [[1, 2, 3], [-1, -2, -3.01]],
    "one is zero": [[1, 2, 3], [0, 0, 0]],
    "all are zero": [[0, 0, 0], [0, 0, 0]],
    "three, one is zero": [[1, 2, 3], [0, 0, 0], [3, 2, 1]],
    "three, all parallel": [[1, 2, 3], [2, 4, 6], [1, 2, 3.01]],
    "three, two opposite": [[1, 2, 3], [-1, -2, -3], [3, 2, 1]],
    "three that cancel out": [[1, 0, 0], [-1 / 2, 3**0.5 / 2, 0], [-1 / 2, -(3**0.5) / 2, 0]],
    "four that cancel out": [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_the_mean_is_linear_where_angles_are_meaningless(case):
    vectors = np.array(DEGENERATE[case], np.float64)
    # Vectors cancel out only at equal weights.
    weights = np.ones(len(vectors)) if "cancel" in case else np.arange(1.0, len(vectors) + 1)
    assert factors_of(vectors, weights).tolist() == (weights / weights.sum()).tolist()


@pytest.mark.slow
@given(PLANE_VECTORS, SEEDS)
def test_factors_are_always_finite(vectors, seed):
    third = np.random.default_rng(seed).choice(vectors.ravel(), size=(1, 4))
    factors = factors_of(np.concatenate([vectors, third]), [0.2, 0.3, 0.5])
    assert np.isfinite(factors).all()


# Other methods


@given(WEIGHTS, SEEDS)
def test_linear_is_the_weighted_mean(weights, seed):
    vectors = in_a_cone(len(weights), seed)
    np.testing.assert_allclose(merge(vectors, weights, linear_mean), slow_linear(vectors, weights), rtol=1e-12)


@given(WEIGHTS, SEEDS, st.floats(-1, 3))
def test_task_arithmetic_adds_the_mean_of_task_vectors(weights, seed, scale):
    base, *vectors = in_a_cone(len(weights) + 1, seed)
    task_vector = slow_linear([vector - base for vector in vectors], weights)
    actual = merge([base, *vectors], [0, *weights], task_arithmetic, scale=scale)
    np.testing.assert_allclose(actual, base + scale * task_vector, rtol=1e-9, atol=1e-9)


def test_weights_are_not_changed_in_place():
    weights = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    gram = torch.from_numpy(in_a_cone(3, seed=0) @ in_a_cone(3, seed=0).T)
    for method in METHODS.values():
        method.function(gram.clone(), weights)
        assert weights.tolist() == [0, 0.5, 0.5]


# Tensors


@given(SEEDS, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_gram_matrices_of_chunks_add_up(seed, lengths):
    vectors = torch.from_numpy(in_a_cone(3, seed, length=sum(lengths))).float()
    parts = [gram_matrix(list(part)) for part in vectors.split(lengths, dim=1)]
    expected = vectors.double() @ vectors.double().T
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram_matrix(list(vectors)), expected, rtol=1e-5, atol=1e-4)


def test_gram_matrices_are_symmetric():
    tensors = [torch.randn(3, 4, 5) for _ in range(3)]
    gram = gram_matrix(tensors)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert gram[1, 2].item() == pytest.approx((tensors[1].double() * tensors[2].double()).sum().item(), abs=1e-4)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4)])
def test_weighted_sums_are_those_of_float64(shape):
    tensors = [torch.randn(shape) for _ in range(3)]
    factors = torch.tensor([0.5, -2.0, 0.25], dtype=torch.float64)
    expected = (0.5 * tensors[0].double() - 2 * tensors[1].double() + 0.25 * tensors[2].double()).float()
    actual = weighted_sum([tensor.clone() for tensor in tensors], factors)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_a_factor_of_zero_changes_no_bit():
    first, second = torch.tensor([-0.0, 1.0, 3e-45]), torch.tensor([1.0, 2.0, 3.0])
    actual = weighted_sum([first.clone(), second], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert actual.view(torch.int32).tolist() == first.view(torch.int32).tolist()


def test_a_mean_is_not_stretched_without_bound():
    """Two biases of two elements, nearly opposite and of different lengths: SLERP would give [1.89, -1.87]."""
    biases = [torch.tensor([0.1, -0.1], dtype=torch.float64), torch.tensor([-0.01, 0.011], dtype=torch.float64)]
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert spherical_mean(gram_matrix(biases), weights).tolist() == [0.5, 0.5]


def test_a_wide_angle_alone_does_not_make_the_mean_linear():
    vectors = [torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([-0.99, 0.141], dtype=torch.float64)]
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert float(spherical_mean(gram_matrix(vectors), weights).min()) > 5
