import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.loss_querit import pairwise_hinge_loss
from modeling_querit.training.arguments import QueritTrainingArguments
from modeling_querit.training.losses import LOSSES, Loss, count_items, listwise_kl, select_losses

FINITE = st.floats(-5, 5, width=32)
LABEL = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])


def by_query(labels, query_ids):
    """Positions of each query with two different labels, without NaN labels."""
    for query in sorted(set(query_ids)):
        positions = [i for i, query_id in enumerate(query_ids) if query_id == query and not math.isnan(labels[i])]
        if len({labels[i] for i in positions}) > 1:
            yield positions


def pairs(labels, query_ids):
    """Positions i, j of one query with a higher label at i."""
    for positions in by_query(labels, query_ids):
        yield from ((i, j) for i in positions for j in positions if labels[i] > labels[j])


def slow_hinge(scores, labels, query_ids, margin_scale=0.8, emphasis=0.0):
    for i, j in pairs(labels, query_ids):
        query_scores = [score for score, query_id in zip(scores, query_ids, strict=True) if query_id == query_ids[i]]
        above = sum(score > scores[j] for score in query_scores)
        margin = margin_scale * (labels[i] - labels[j]) * (2 if above < emphasis * len(query_scores) else 1)
        yield max(0.0, margin - (scores[i] - scores[j]))


def slow_margin_mse(scores, labels, query_ids, margin_scale=1.0):
    for i, j in pairs(labels, query_ids):
        yield ((scores[i] - scores[j]) - margin_scale * (labels[i] - labels[j])) ** 2


def slow_ranknet(scores, labels, query_ids):
    for i, j in pairs(labels, query_ids):
        yield math.log(1 + math.exp(scores[j] - scores[i]))


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def slow_listwise_kl(scores, labels, query_ids, temperature=0.1):
    for positions in by_query(labels, query_ids):
        target = softmax([labels[i] / temperature for i in positions])
        predicted = softmax([scores[i] for i in positions])
        yield sum(p * math.log(p / q) for p, q in zip(target, predicted, strict=True) if p)


def slow_pointwise_bce(scores, labels, query_ids):
    for positions in by_query(labels, query_ids):
        for i in positions:
            p = 1 / (1 + math.exp(-scores[i]))
            yield -labels[i] * math.log(p) - (1 - labels[i]) * math.log(1 - p)


SLOW = {
    "pairwise_hinge": slow_hinge,
    "margin_mse": slow_margin_mse,
    "ranknet": slow_ranknet,
    "listwise_kl": slow_listwise_kl,
    "pointwise_bce": slow_pointwise_bce,
}
SETTINGS = [
    ("pairwise_hinge", {"margin_scale": 0.3, "emphasis": 0.3}),
    ("pairwise_hinge", {"emphasis": 1.0}),
    ("margin_mse", {"margin_scale": 2.0}),
    ("listwise_kl", {"temperature": 0.7}),
]


def batches():
    return st.integers(1, 9).flatmap(
        lambda size: st.tuples(
            st.lists(FINITE, min_size=size, max_size=size),
            st.lists(LABEL, min_size=size, max_size=size),
            st.lists(st.integers(0, 2), min_size=size, max_size=size),
        )
    )


def tensors(batch):
    scores, labels, query_ids = batch
    return torch.tensor(scores), torch.tensor(labels), torch.tensor(query_ids)


def mean(losses):
    losses = list(losses)
    return sum(losses) / len(losses) if losses else 0.0


def test_every_loss_has_a_slow_formula():
    assert set(SLOW) == set(LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in LOSSES), *SETTINGS])
@given(batches())
def test_equals_the_slow_formula(name, settings, batch):
    slow = list(SLOW[name](*batch, **settings))
    loss = LOSSES[name].function(*tensors(batch), **settings)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mean(slow), abs=1e-4, rel=1e-4)
    items = LOSSES[name].function(*tensors(batch), **settings, reduction="none")
    assert sorted(items.tolist()) == pytest.approx(sorted(slow), abs=1e-4, rel=1e-4)
    assert count_items(LOSSES[name], *tensors(batch)[1:]) == len(slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_documents_and_the_names_of_queries_do_not_matter(name, batch, random):
    scores, labels, query_ids = tensors(batch)
    order = list(range(len(scores)))
    random.shuffle(order)
    function = LOSSES[name].function
    shuffled = function(scores[order], labels[order], 7 - query_ids[order])
    assert shuffled.item() == pytest.approx(function(scores, labels, query_ids).item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@given(batches())
def test_a_batch_is_the_sum_of_its_queries(name, batch):
    """Gradient accumulation and several processes rely on it: sums and counts add up, however a batch is split."""
    scores, labels, query_ids = tensors(batch)
    function = LOSSES[name].function
    parts = [query_ids == query for query in query_ids.unique()]
    sums = [function(scores[part], labels[part], query_ids[part], reduction="sum").item() for part in parts]
    assert function(scores, labels, query_ids, reduction="sum").item() == pytest.approx(sum(sums), abs=1e-4, rel=1e-5)
    counts = [count_items(LOSSES[name], labels[part], query_ids[part]) for part in parts]
    assert count_items(LOSSES[name], labels, query_ids) == sum(counts)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    scores = torch.tensor([0.3, 0.1, -0.4]).bfloat16()
    labels, query_ids = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
    function = LOSSES[name].function
    assert torch.equal(function(scores, labels, query_ids), function(scores.float(), labels, query_ids))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [[0.0, 0.0], [1.0, 1.0], [0.4, math.nan], [math.nan, math.nan]])
def test_a_query_without_anything_to_compare_gives_zero_and_a_gradient(name, labels):
    scores = torch.tensor([0.3, 0.1], requires_grad=True)
    loss = LOSSES[name].function(scores, torch.tensor(labels), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0]
    single = LOSSES[name].function(scores[:1], torch.tensor([1.0]), torch.tensor([0]))
    assert single.item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_large_scores_stay_finite(name):
    scores = torch.tensor([3e4, -3e4, 1e4], dtype=torch.bfloat16, requires_grad=True)
    loss = LOSSES[name].function(scores, torch.tensor([0.0, 1.0, 0.5]), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    # No difference is near a margin, where the hinge has a corner.
    scores = torch.tensor([0.31, -0.22, 0.13, 0.7, -0.51], dtype=torch.float64, requires_grad=True)
    labels, query_ids = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda values: LOSSES[name].function(values, labels, query_ids), scores)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_checked(name):
    with pytest.raises(ValueError, match=r"\(2, 1\), \(2,\), \(2,\)"):
        LOSSES[name].function(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))


def test_the_hinge_is_dead_where_scores_saturate_and_on_the_logit_it_is_not():
    """A trap: the loss is stuck at the margin."""
    logits = torch.tensor([60.0, 60.0], requires_grad=True)
    labels, query_ids = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    pairwise_hinge_loss(torch.tanh(logits / 2), labels, query_ids).backward()
    assert logits.grad.tolist() == [0, 0]
    pairwise_hinge_loss(logits, labels, query_ids).backward()
    assert logits.grad.tolist() == [-1, 1]
    logits.grad = None
    listwise_kl(logits, labels, query_ids).backward()
    assert logits.grad.abs().min() > 0.4


def test_a_name_may_say_which_output_a_loss_is_computed_on():
    selected = select_losses(
        ["pairwise_hinge", "pairwise_hinge:logit", "listwise_kl"], margin_scale=0.5, temperature=None
    )
    assert [loss.output for loss in selected.values()] == ["score", "logit", "logit"]
    batch = tensors(([0.0, 0.0], [1.0, 0.0], [0, 0]))
    assert selected["pairwise_hinge"].function(*batch).item() == 0.5
    assert selected["listwise_kl"].function(*batch).item() == listwise_kl(*batch).item()


def test_settings_have_the_defaults_of_the_functions():
    for loss in LOSSES.values():
        parameters = inspect.signature(loss.function).parameters
        assert {name: parameters[name].default for name in loss.settings} == loss.settings


def test_a_setting_without_a_training_argument_has_its_default(monkeypatch, tmp_path):
    def shifted(scores, labels, query_ids, shift, reduction="mean"):
        return scores.mean() + shift

    monkeypatch.setitem(LOSSES, "shifted", Loss(shifted, "score", {"shift": 3.0}))
    args = QueritTrainingArguments(str(tmp_path), losses=["shifted", "pairwise_hinge"], margin_scale=0.5)
    selected = select_losses(args.losses, **args.loss_settings())
    batch = tensors(([0.0, 0.0], [1.0, 0.0], [0, 0]))
    assert [loss.function(*batch).item() for loss in selected.values()] == [3.0, 0.5]
    assert select_losses(["shifted"], shift=1.0)["shifted"].function(*batch).item() == 1.0


@pytest.mark.parametrize("names", [[], ["hinge"], ["pairwise_hinge:logits"], [":score"]])
def test_unknown_losses_are_refused(names):
    with pytest.raises(ValueError, match="choose from pairwise_hinge, margin_mse, listwise_kl, ranknet, pointwise_bce"):
        select_losses(names)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="mean, sum or none"):
        pairwise_hinge_loss(*tensors(([0.0], [1.0], [0])), reduction="average")
