"""The model's forward pass on packs: what training runs on."""

import copy
import threading

import pytest
import tiny
import torch

from modeling_querit.attention_querit import CannotPack
from modeling_querit.engine_querit import can_pack, inputs_of
from modeling_querit.packing_querit import plan_packs


@pytest.fixture
def pack(processor):
    queries = [tiny.QUERY] * len(tiny.DOCUMENTS) + ["another one"] * 2
    encoded = processor.encode(queries, [*tiny.DOCUMENTS, "a book", "b"])
    groups = [list(range(len(tiny.DOCUMENTS))), [len(tiny.DOCUMENTS), len(tiny.DOCUMENTS) + 1]]
    (pack,) = plan_packs([pair.input_ids for pair in encoded], groups, batch_tokens=10_000)
    return pack


@pytest.fixture
def fresh(model):
    return copy.deepcopy(model)


def test_scores_are_those_of_single_pairs(model, pack):
    with torch.no_grad():
        scores = model(pack=pack).score
    pairs = [*tiny.pairs(), ("another one", "a book"), ("another one", "b")]
    assert scores.flatten().tolist() == pytest.approx(model.predict(pairs).tolist(), abs=1e-5)


def test_ids_may_be_given_or_left_out(model, pack):
    with torch.no_grad():
        alone, both = model(pack=pack).logits, model(pack=pack, **inputs_of(pack)).logits
        ids = model(pack=pack, input_ids=inputs_of(pack)["input_ids"]).logits
    assert torch.equal(alone, both)
    assert torch.equal(alone, ids)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, "not with attention_mask"),
        ({"inputs_embeds": torch.ones(1, 3, 32)}, "not with inputs_embeds"),
        ({"output_hidden_states": True}, "not with output_hidden_states"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, r"input_ids has shape \(1, 3\)"),
    ],
)
def test_nothing_else_goes_with_a_pack(model, pack, others, message):
    with pytest.raises(ValueError, match=message):
        model(pack=pack, **others)


def test_two_backward_passes_through_repeated_layers(fresh, pack):
    fresh.train()
    fresh.gradient_checkpointing_enable()
    score = fresh(pack=pack).score.sum()
    score.backward(retain_graph=True)
    once = fresh.score.weight.grad.clone(), fresh.model.embed_tokens.weight.grad.clone()
    score.backward()
    for first, parameter in zip(once, (fresh.score.weight, fresh.model.embed_tokens.weight), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)


@pytest.mark.parametrize("settings", [None, {"preserve_rng_state": False}, {"use_reentrant": False}])
def test_repeated_layers_know_their_pack(fresh, pack, settings):
    fresh.train()
    fresh(pack=pack).score.sum().backward()
    expected = fresh.model.embed_tokens.weight.grad.clone()
    fresh.zero_grad()
    fresh.gradient_checkpointing_enable(settings)
    fresh(pack=pack).score.sum().backward()
    torch.testing.assert_close(fresh.model.embed_tokens.weight.grad, expected, atol=1e-5, rtol=1e-4)


def test_reentrant_checkpointing_is_refused(fresh, pack):
    fresh.gradient_checkpointing_enable({"use_reentrant": True})
    fresh.train()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        fresh(pack=pack)
    fresh.gradient_checkpointing_disable()
    fresh(pack=pack)


def test_dropout_of_attention_is_not_passed_over(fresh, pack):
    assert can_pack(fresh)
    for module in fresh.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    fresh.model.config.attention_dropout = 0.5
    assert not can_pack(fresh)
    fresh.eval()(pack=pack)
    with pytest.raises(CannotPack, match="dropout"):
        fresh.train()(pack=pack)


@pytest.mark.parametrize("is_training", [True, False])
def test_threads_leave_the_model_as_it_was(fresh, pack, is_training):
    """Two backward passes with repeated layers; or a forward pass beside a ranking."""
    fresh.gradient_checkpointing_enable()
    before = fresh.model.config._attn_implementation
    expected = fresh.predict(tiny.pairs()).tolist()
    errors = []

    def forward():
        score = fresh(pack=pack).score.sum()
        if is_training:
            score.backward()

    def repeat(run):
        try:
            for _ in range(6):
                run()
        except Exception as error:
            errors.append(error)

    other = forward if is_training else lambda: fresh.predict(tiny.pairs())
    threads = [threading.Thread(target=repeat, args=(run,)) for run in (forward, other)]
    fresh.train(is_training)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert fresh.model.config._attn_implementation == before
    assert fresh.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_position_embeddings_that_depend_on_the_longest_text_see_one_text_at_a_time(processor, rope):
    """Otherwise a long neighbour would change a short text's score."""
    sizes = {"max_position_embeddings": 64} if rope["rope_type"] == "dynamic" else {}
    model = tiny.make_model("llama", processor, rope_parameters=rope, **sizes)
    pairs = [(tiny.QUERY, "x"), (tiny.QUERY, tiny.LONG_DOCUMENT), (tiny.QUERY, "a novel by lee")]
    alone = []
    for query, document in pairs:
        inputs = processor([query], [document])
        with torch.no_grad():
            alone.append(model(**inputs).score.item())
    assert model.predict(pairs).tolist() == pytest.approx(alone, abs=1e-5)
    assert model.predict(pairs[::-1], batch_tokens=1).tolist() == pytest.approx(alone[::-1], abs=1e-5)
    with pytest.raises(CannotPack):
        model(pack=next(plan_packs([[1, 2]], [[0]], 10)))
