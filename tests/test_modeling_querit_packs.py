"""The model's forward pass on packs, as ranking and training call it."""

import copy
import threading
from functools import partial

import pytest
import tiny
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from modeling_querit.packed_attention_querit import PackingError
from modeling_querit.packed_forward_querit import can_train_packed
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
        alone, both = model(pack=pack).logits, model(pack=pack, **pack.to_tensors()).logits
        ids = model(pack=pack, input_ids=pack.to_tensors()["input_ids"]).logits
    assert torch.equal(alone, both)
    assert torch.equal(alone, ids)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, "leave out attention_mask"),
        ({"inputs_embeds": torch.ones(1, 3, 32)}, "leave out inputs_embeds"),
        ({"output_hidden_states": True}, "leave out output_hidden_states"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, r"input_ids has shape \(1, 3\)"),
    ],
)
def test_nothing_else_goes_with_a_pack(model, pack, others, message):
    with pytest.raises(ValueError, match=message):
        model(pack=pack, **others)


def embedding_gradient(model, pack):
    model.zero_grad()
    model(pack=pack).score.sum().backward()
    return model.model.embed_tokens.weight.grad.clone()


def test_two_backward_passes_through_repeated_layers(fresh, pack):
    fresh.train()
    fresh.gradient_checkpointing_enable()
    score = fresh(pack=pack).score.sum()
    score.backward(retain_graph=True)
    once = fresh.score.weight.grad.clone(), fresh.model.embed_tokens.weight.grad.clone()
    score.backward()
    for first, parameter in zip(once, (fresh.score.weight, fresh.model.embed_tokens.weight), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)


@pytest.mark.parametrize(
    "settings", [None, {"use_reentrant": False, "preserve_rng_state": False}, {"use_reentrant": True}]
)
def test_repeated_layers_know_their_pack(fresh, pack, settings):
    fresh.train()
    expected = embedding_gradient(fresh, pack)
    fresh.gradient_checkpointing_enable(settings)
    torch.testing.assert_close(embedding_gradient(fresh, pack), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_layers_that_fsdp_repeats_know_their_pack(fresh, pack, implementation):
    """FSDP's activation checkpointing wraps the layers by itself."""
    fresh.train()
    expected = embedding_gradient(fresh, pack)
    wrap = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(
        fresh, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in set(fresh.model.layers)
    )
    torch.testing.assert_close(embedding_gradient(fresh, pack), expected, atol=1e-5, rtol=1e-4)


def test_layers_are_repeated_in_another_thread(fresh, pack):
    """On a GPU, a backward pass has a thread of its own."""
    fresh.train()
    expected = embedding_gradient(fresh, pack)
    fresh.gradient_checkpointing_enable()
    fresh.zero_grad()
    score = fresh(pack=pack).score.sum()
    thread = threading.Thread(target=score.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(fresh.model.embed_tokens.weight.grad, expected, atol=1e-5, rtol=1e-4)


def test_a_packs_states_are_carried_to_the_next(model, processor):
    encoded = processor.encode([tiny.QUERY] * len(tiny.DOCUMENTS), tiny.DOCUMENTS)
    input_ids = [pair.input_ids for pair in encoded]
    packs = list(plan_packs(input_ids, [list(range(len(input_ids)))], batch_tokens=60))
    assert len(packs) > 2
    carried, scores = None, {}
    with torch.no_grad():
        for pack in packs:
            output = model(pack=pack, carried=carried)
            carried = output.carried
            scores |= dict(zip(pack.pairs, output.score.flatten().tolist(), strict=True))
    # Nothing follows the last pack.
    assert carried is None
    expected = [tiny.reference_score(model, ids) for ids in input_ids]
    assert [scores[pair] for pair in range(len(input_ids))] == pytest.approx(expected, abs=1e-5)


def test_a_pack_without_the_states_it_continues_is_refused(model):
    first, second = plan_packs([[1, 2, 3], [1, 2, 4]], [[0, 1]], batch_tokens=3)
    with torch.no_grad():
        carried = model(pack=first).carried
        model(pack=second, carried=carried)
    with pytest.raises(ValueError, match="carried"):
        model(pack=second)


def test_dropout_of_attention_is_not_ignored(fresh, pack):
    assert can_train_packed(fresh)
    for module in fresh.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    fresh.model.config.attention_dropout = 0.5
    assert not can_train_packed(fresh)
    fresh.eval()(pack=pack)
    with pytest.raises(PackingError, match="dropout"):
        fresh.train()(pack=pack)


@pytest.mark.slow
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
    with pytest.raises(PackingError):
        model(pack=next(plan_packs([[1, 2]], [[0]], 10)))
