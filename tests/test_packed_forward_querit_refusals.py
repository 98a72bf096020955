"""Backbones that packs cannot go through: they are padded, with the same scores."""

import pytest
from packs import forward_passes, is_left_as_it_was, make_other, plain, score

from modeling_querit.packed_attention_querit import PackingError
from modeling_querit.packed_forward_querit import supports_packing
from modeling_querit.packing_querit import plan_packs


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        # Soft caps.
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
        # Sinks.
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 16}),
        # Two attentions in a module.
        ("diffllama", {}),
        # A window that only its mask knows of.
        ("phimoe", {"num_local_experts": 4, "sliding_window": 16}),
        # Keyword arguments do not reach its attention.
        ("nemotron", {}),
    ],
)
def test_attention_that_packs_cannot_express_is_padded(processor, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    if model_type == "gemma2":
        # As newer versions of transformers do by themselves: sdpa has no soft caps.
        model.set_attn_implementation("eager")
    expected = plain(model)
    with forward_passes(model) as packs:
        for batch_tokens in [150, 100_000]:
            with is_left_as_it_was(model):
                assert score(model, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-5)
    # Packing is tried once, and not again.
    assert packs[0] is not None
    assert set(packs[1:]) == {None}


def test_the_reason_why_packs_are_refused_is_named(processor):
    pack = next(plan_packs([[1, 2]], [[0]], batch_tokens=2))
    model = make_other("diffllama", processor)
    with pytest.raises(PackingError, match="several attentions in one module"):
        model(pack=pack)
    model.set_attn_implementation("eager")
    with pytest.raises(PackingError, match="eager attention"):
        model(pack=pack)


def drop_keyword(method):
    """A method of a module that hands on all keyword arguments but one."""

    def without_keyword(*args, packed_forward=None, **kwargs):
        return method(*args, **kwargs)

    return without_keyword


def refuse_keyword(method):
    """A method of a module that takes only the keyword arguments it knows."""

    def strict(
        hidden_states, attention_mask, position_ids, past_key_values, position_embeddings, use_cache=False
    ):  # fmt: skip
        return method(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
        )

    return strict


@pytest.mark.parametrize("change", [drop_keyword, refuse_keyword])
@pytest.mark.parametrize("layers", [[0, 1], [0], [1]], ids=["all layers", "first layer", "last layer"])
def test_backbones_that_do_not_hand_on_the_keyword_are_padded(fresh_model, change, layers):
    model, expected = fresh_model("qwen3")
    for index in layers:
        layer = model.model.layers[index]
        layer.forward = change(layer.forward)
    with forward_passes(model) as packs:
        assert score(model) == pytest.approx(expected, abs=1e-5)
    assert packs[0] is not None
    assert set(packs[1:]) == {None}


def test_backbones_with_layers_that_do_not_attend_by_the_interface_are_padded(fresh_model):
    model, expected = fresh_model("qwen3")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def attend_plainly(hidden_states, packed_forward=None, attention_mask=None, **kwargs):
        # As a layer would that computes attention by itself, over the whole pack.
        mask = None if packed_forward is not None else attention_mask
        return forward(hidden_states, attention_mask=mask, **kwargs)

    attention.forward = attend_plainly
    with forward_passes(model) as packs:
        assert score(model) == pytest.approx(expected, abs=1e-5)
    assert set(packs[1:]) == {None}


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        # Chunks.
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}),
        # Linear attention.
        ("minimax", {"num_local_experts": 4}),
        # Its own attention functions.
        ("stablelm", {}),
    ],
)
def test_other_types_of_layers_are_padded(processor, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    expected = plain(model)
    assert not supports_packing(model.model)
    with forward_passes(model) as packs:
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert set(packs) == {None}


@pytest.mark.parametrize(("name", "value"), [("_supports_attention_backend", False), ("_is_stateful", True)])
def test_backbones_that_do_not_use_the_interface_are_padded(reference_model, monkeypatch, name, value):
    model, expected = reference_model("qwen3")
    monkeypatch.setattr(type(model.model), name, value)
    assert not supports_packing(model.model)
    with forward_passes(model) as packs:
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert set(packs) == {None}


@pytest.mark.parametrize(
    ("layer_types", "is_supported"),
    [
        (None, True),
        (["full_attention"] * 2, True),
        (["sliding_attention", "full_attention"], True),
        (["linear_attention", "full_attention"], False),
        (["full_attention", "conv"], False),
    ],
)
def test_types_of_layers_that_packs_support(fresh_model, layer_types, is_supported):
    model, _ = fresh_model("qwen3")
    model.model.config.layer_types = layer_types
    assert supports_packing(model.model) == is_supported
