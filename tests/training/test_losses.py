import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.loss_querit import pairwise_hinge_loss
from modeling_querit.training.losses import LOSSES, ON_LOGIT, ON_SCORE, listwise_kl, pointwise_bce

ALL = ON_SCORE | ON_LOGIT
FINITE = st.floats(-5, 5, width=32)
LABEL = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def slow_listwise_kl(scores, labels, query_ids):
    losses = []
    for query in set(query_ids):
        mine = [index for index, each in enumerate(query_ids) if each == query]
        total = sum(labels[index] for index in mine)
        if total == 0:
            continue
        normaliser = math.log(sum(math.exp(scores[index]) for index in mine))
        loss = 0.0
        for index in mine:
            target = labels[index] / total
            if target:
                loss += target * (math.log(target) - (scores[index] - normaliser))
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0


def slow_pointwise_bce(scores, labels, query_ids):
    def one(score, label):
        p = 1 / (1 + math.exp(-score))
        return -label * math.log(p) - (1 - label) * math.log(1 - p)

    return sum(map(one, scores, labels)) / len(scores)


def slow_pairwise_hinge(scores, labels, query_ids):
    losses = [
        max(0.0, 0.8 * (labels[i] - labels[j]) - (scores[i] - scores[j]))
        for i in range(len(scores))
        for j in range(len(scores))
        if query_ids[i] == query_ids[j] and labels[i] > labels[j]
    ]
    return sum(losses) / len(losses) if losses else 0.0


SLOW = {
    "listwise_kl": slow_listwise_kl,
    "pointwise_bce": slow_pointwise_bce,
    "pairwise_hinge": slow_pairwise_hinge,
}


def batches():
    return st.integers(1, 9).flatmap(
        lambda size: st.tuples(
            st.lists(FINITE, min_size=size, max_size=size),
            st.lists(LABEL, min_size=size, max_size=size),
            st.lists(st.integers(0, 2), min_size=size, max_size=size),
        )
    )


def test_every_loss_is_checked_here():
    assert sorted(SLOW) == LOSSES


@pytest.mark.parametrize("name", LOSSES)
@given(batches())
def test_equals_the_slow_formula(name, batch):
    scores, labels, query_ids = batch
    loss = ALL[name](torch.tensor(scores), torch.tensor(labels), torch.tensor(query_ids))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SLOW[name](scores, labels, query_ids), abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_documents_and_the_names_of_queries_do_not_matter(name, batch, random):
    scores, labels, query_ids = map(torch.tensor, batch)
    order = list(range(len(scores)))
    random.shuffle(order)
    shuffled = ALL[name](scores[order], labels[order], 7 - query_ids[order])
    assert shuffled.item() == pytest.approx(ALL[name](scores, labels, query_ids).item(), abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    scores = torch.tensor([0.3, 0.1, -0.4]).bfloat16()
    labels, query_ids = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
    assert torch.equal(ALL[name](scores, labels, query_ids), ALL[name](scores.float(), labels, query_ids))


@pytest.mark.parametrize("name", ["pairwise_hinge", "listwise_kl"])
def test_a_query_without_anything_to_compare_gives_zero_and_a_gradient(name):
    scores = torch.tensor([0.3, 0.1], requires_grad=True)
    loss = ALL[name](scores, torch.zeros(2), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0]


@pytest.mark.parametrize("loss", [listwise_kl, pointwise_bce, pairwise_hinge_loss])
def test_gradients(loss):
    scores = torch.tensor([0.31, -0.22, 0.13, 0.7, -0.51], dtype=torch.float64)
    labels, query_ids = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    wide = scores.clone().requires_grad_()
    loss(wide, labels, query_ids).backward()
    step = 1e-2
    for index in range(len(scores)):
        nudge = torch.zeros_like(scores)
        nudge[index] = step
        slope = (loss(scores + nudge, labels, query_ids) - loss(scores - nudge, labels, query_ids)) / (2 * step)
        assert wide.grad[index].item() == pytest.approx(slope.item(), abs=1e-3)


def test_the_hinge_is_dead_where_scores_saturate_and_the_listwise_loss_is_not():
    """Why the mini is trained on the logit difference (the design's trap: loss stuck at the margin)."""
    logits = torch.tensor([60.0, 60.0], requires_grad=True)
    labels, query_ids = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    pairwise_hinge_loss(torch.tanh(logits / 2), labels, query_ids).backward()
    assert logits.grad.tolist() == [0, 0]
    listwise_kl(logits, labels, query_ids).backward()
    assert logits.grad.abs().min() > 0.4
