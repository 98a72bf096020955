import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from modeling_querit.loss_querit import pairwise_hinge_loss

ROWS = st.lists(
    st.tuples(
        st.floats(-1, 1, width=32),
        st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1, width=32)),
        st.integers(0, 3),
    ),
    max_size=12,
)


def slow_hinge(scores, labels, query_ids, margin_scale):
    losses = []
    for i in range(len(scores)):
        for j in range(len(scores)):
            if query_ids[i] == query_ids[j] and labels[i] > labels[j]:
                losses.append(max(0.0, margin_scale * (labels[i] - labels[j]) - (scores[i] - scores[j])))
    return math.fsum(losses) / len(losses) if losses else 0.0


@given(ROWS, st.sampled_from([0.25, 0.8, 2.0]))
def test_equals_the_double_loop(rows, margin_scale):
    scores, labels, query_ids = ([row[column] for row in rows] for column in range(3))
    loss = pairwise_hinge_loss(
        torch.tensor(scores), torch.tensor(labels), torch.tensor(query_ids, dtype=torch.long), margin_scale
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_hinge(scores, labels, query_ids, margin_scale), abs=1e-5)


def test_worked_example():
    loss = pairwise_hinge_loss(tensor([0.5, 0.0]), tensor([1.0, 0.0]), tensor([7, 7]))
    assert loss.item() == pytest.approx(0.3)


def test_only_documents_of_one_query_are_compared():
    loss = pairwise_hinge_loss(tensor([0.0, 0.9]), tensor([1.0, 0.0]), tensor([1, 2]))
    assert loss.item() == 0


def test_without_pairs_the_loss_is_zero_and_differentiable():
    scores = torch.tensor([0.1, 0.2], requires_grad=True)
    loss = pairwise_hinge_loss(scores, tensor([1.0, 1.0]), tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0]


def test_gradient_raises_the_better_document():
    scores = torch.tensor([0.0, 0.0, 0.9, -0.9], requires_grad=True)
    pairwise_hinge_loss(scores, tensor([1.0, 0.0, 1.0, 0.0]), tensor([0, 0, 1, 1])).backward()
    # The pair of the second query already keeps its margin.
    assert scores.grad.tolist() == [-0.5, 0.5, 0, 0]


def test_unknown_labels_take_part_in_no_pair():
    scores = torch.tensor([0.5, 0.0, 0.3], requires_grad=True)
    loss = pairwise_hinge_loss(scores, tensor([1.0, 0.0, math.nan]), tensor([0, 0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3)
    assert scores.grad.tolist() == [-1, 1, 0]


def test_computes_in_float32_whatever_comes_in():
    scores = torch.tensor([0.5, 0.25, -0.125], dtype=torch.bfloat16)
    loss = pairwise_hinge_loss(scores, tensor([2, 1, 0]), tensor([0, 0, 0], dtype=torch.int32))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(((0.8 - 0.25) + (0.8 - 0.375) + (1.6 - 0.625)) / 3)


def test_is_no_less_exact_under_autocast():
    scores, labels, query_ids = torch.randn(16).tanh(), torch.rand(16), torch.zeros(16, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pairwise_hinge_loss(scores, labels, query_ids)
    assert loss.item() == pairwise_hinge_loss(scores, labels, query_ids).item()
