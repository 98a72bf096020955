"""Attention within packs, compared with a plain softmax over explicit masks in float64."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from modeling_querit import packed_attention_querit
from modeling_querit.packed_attention_querit import (
    PLACEHOLDER_MASK_SHAPE,
    PackedForward,
    PackingError,
    accept_packed_forward,
)
from modeling_querit.packing_querit import Pack, plan_packs

SIZE = 8
METHODS = ["by segment", "by length", "flash"]
# For each group the length of its prefix and of the rest of its pairs; and the tokens of a pack.
LAYOUTS = {
    "one text": ([(0, [5])], 1000),
    "texts": ([(0, [7, 6, 5, 1, 1])], 1000),
    "prefix": ([(4, [6, 5, 1])], 1000),
    "prefixes": ([(4, [6, 1]), (0, [3]), (9, [2, 2, 2])], 1000),
    "carried": ([(5, [4, 3, 3, 2, 1, 1])], 9),
    "carried from the middle": ([(3, [2, 2]), (6, [5, 4, 3, 2, 1]), (2, [4, 4])], 14),
    "long": ([(0, [300]), (140, [257, 129, 128, 2])], 1000),
    "long and carried": ([(140, [150, 130, 9])], 300),
}
# Without a shared prefix, as attention in both directions needs them.
UNSHARED = {
    "one text": ([(0, [5])], 1000),
    "texts": ([(0, [7, 6, 5, 1, 1])], 1000),
    "long": ([(0, [300, 257, 129, 128, 2])], 1000),
}
WINDOWS = [None, 1, 3, 140]


def make_packs(layout, layouts=LAYOUTS):
    groups, batch_tokens = layouts[layout]
    input_ids, members = [], []
    for number, (prefix, lengths) in enumerate(groups):
        members.append(range(len(input_ids), len(input_ids) + len(lengths)))
        # No two pairs continue alike.
        input_ids += [[number] * prefix + [10 + pair] * length for pair, length in enumerate(lengths)]
    return list(plan_packs(input_ids, members, batch_tokens))


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax_attention(query, key, value, may_attend, scaling):
    """(queries, heads, size) in float64; keys and values may have fewer heads."""
    query, key, value = (states[0].double() for states in (query, key, value))
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    weights = (query @ key.transpose(1, 2) * scaling).masked_fill(~may_attend, float("-inf"))
    return (weights.softmax(-1) @ value).transpose(0, 1)


def causal_mask(pack, window):
    """(positions, keys): the keys of its pair up to itself, the last `window` of them."""
    mask = torch.zeros(len(pack), pack.carried_length + len(pack), dtype=torch.bool)
    for segment in pack.segments:
        keys = list(range(segment.prefix.start, segment.prefix.stop))
        for position in range(segment.positions.start, segment.positions.stop):
            keys.append(pack.carried_length + position)
            mask[position, keys[-window:] if window else keys] = True
    return mask


def bidirectional_mask(pack, window):
    """(positions, keys): the keys of its pair, those fewer than `window` tokens away."""
    mask = torch.zeros(len(pack), len(pack), dtype=torch.bool)
    for segment in pack.segments:
        span = slice(segment.positions.start, segment.positions.stop)
        positions = torch.arange(span.start, span.stop)
        distances = (positions.unsqueeze(1) - positions).abs()
        mask[span, span] = distances < (window or len(pack))
    return mask


def flash_attention(query, key, value, attention_mask, *, softmax_scale, sliding_window, **kwargs):
    """Variable lengths as transformers' flash attention computes them: aligned at the last query and key."""
    assert attention_mask is None
    assert kwargs["attn_implementation"] == "flash_attention_2"
    assert query.shape[3] == key.shape[3] == value.shape[3]
    assert kwargs["query_length"] == query.shape[1]
    ends = [kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]]
    assert {end.dtype for end in ends} == {torch.int32}
    query_lengths, key_lengths = (end.diff().tolist() for end in ends)
    assert (max(query_lengths), max(key_lengths)) == (kwargs["max_length_q"], kwargs["max_length_k"])
    assert (sum(query_lengths), sum(key_lengths)) == (query.shape[1], key.shape[1])
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    outputs = []
    for text_query, text_key, text_value in zip(
        query.split(query_lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True
    ):
        window = sliding_window or text_key.shape[2]
        last = torch.arange(text_query.shape[2]).unsqueeze(1) + text_key.shape[2] - text_query.shape[2]
        positions = torch.arange(text_key.shape[2])
        mask = positions > last - window
        mask &= positions <= last if kwargs["is_causal"] else positions < last + window
        outputs.append(softmax_attention(text_query, text_key, text_value, mask, softmax_scale))
    return torch.cat(outputs).unsqueeze(0).to(query.dtype)


@pytest.fixture
def attend(monkeypatch):
    """Sends packs through an attention module, one after another; yields outputs and what they should be."""
    monkeypatch.setattr(packed_attention_querit, "_flash_attention_forward", flash_attention)

    def run(packs, method, *, is_causal=True, window=None, heads=4, groups=1, value_size=SIZE, dtype=torch.float64):
        if method == "by length":
            by_length = packed_attention_querit._attend_by_length
            monkeypatch.setattr(packed_attention_querit, "_attend_by_segment", by_length)
        module, carried, expected_carried = nn.Module(), {}, None
        module.is_causal = is_causal
        implementation = "flash_attention_2" if method == "flash" else "sdpa"
        pruned_layer = 0 if method == "scored positions" else 3
        for seed, pack in enumerate(packs):
            shapes = [(heads, SIZE), (heads // groups, SIZE), (heads // groups, value_size)]
            query, key, value = (
                normal(1, count, len(pack), size, seed=3 * seed + index, dtype=dtype)
                for index, (count, size) in enumerate(shapes)
            )
            packed_forward = PackedForward(pack, carried, implementation, pruned_layer, is_causal)
            output, weights = packed_forward.attend(
                module, query, key, value, scaling=0.4, sliding_window=window, dropout=0.0
            )
            assert weights is None
            assert output.dtype == dtype
            assert output.shape == (1, len(pack), heads, value_size)
            carried = packed_forward.carry_over
            if pack.carried_length:
                key, value = torch.cat((expected_carried[0], key), 2), torch.cat((expected_carried[1], value), 2)
            expected_carried = key[:, :, pack.carry_over], value[:, :, pack.carry_over]
            mask = (causal_mask if is_causal else bidirectional_mask)(pack, window)
            yield pack, output[0], softmax_attention(query, key, value, mask, 0.4)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_tokens_attend_within_their_pair(attend, method, layout, window):
    packs = make_packs(layout)
    assert any(pack.carried_length for pack in packs) == ("carried" in layout)
    for _, output, expected in attend(packs, method, window=window):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 4])
def test_in_the_pruned_layer_only_scored_positions_attend(attend, layout, window, groups):
    for pack, output, expected in attend(make_packs(layout), "scored positions", window=window, groups=groups):
        torch.testing.assert_close(output[pack.scored_positions], expected[pack.scored_positions], rtol=0, atol=1e-12)
        others = sorted(set(range(len(pack))) - set(pack.scored_positions))
        assert not output[others].any()


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "scored positions"])
@pytest.mark.parametrize("layout", UNSHARED)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("value_size", [SIZE, 5])
def test_tokens_attend_within_their_pair_in_both_directions(attend, method, layout, window, value_size):
    packs = make_packs(layout, UNSHARED)
    for pack, output, expected in attend(packs, method, is_causal=False, window=window, value_size=value_size):
        positions = pack.scored_positions if method == "scored positions" else slice(None)
        torch.testing.assert_close(output[positions], expected[positions], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "scored positions"])
@pytest.mark.parametrize("layout", ["prefixes", "carried from the middle", "long and carried"])
@pytest.mark.parametrize(("heads", "groups", "value_size"), [(4, 2, SIZE), (4, 4, SIZE), (2, 1, 5), (6, 3, 5)])
def test_grouped_heads_and_small_values(attend, method, layout, heads, groups, value_size):
    sizes = {"heads": heads, "groups": groups, "value_size": value_size}
    for pack, output, expected in attend(make_packs(layout), method, **sizes):
        positions = pack.scored_positions if method == "scored positions" else slice(None)
        torch.testing.assert_close(output[positions], expected[positions], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "scored positions"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
@pytest.mark.parametrize("value_size", [SIZE, 5])
def test_dtypes(attend, method, dtype, tolerance, value_size):
    packs = make_packs("long and carried")
    for pack, output, expected in attend(packs, method, window=100, dtype=dtype, value_size=value_size):
        positions = pack.scored_positions if method == "scored positions" else slice(None)
        torch.testing.assert_close(output[positions].double(), expected[positions], rtol=0, atol=tolerance)


def test_what_is_carried_over_is_a_copy():
    """Otherwise the states of a whole pack would stay in memory with those of its prefix."""
    [pack, *_] = make_packs("carried")
    packed_forward, module = PackedForward(pack, {}, "sdpa"), nn.Module()
    states = normal(1, 2, len(pack), SIZE, seed=0)
    packed_forward.attend(module, states, states, states)
    key, value = packed_forward.carry_over[0]
    assert key.shape[2] == 5
    assert key.untyped_storage().nbytes() == value.untyped_storage().nbytes() == key.numel() * 8


def test_layers_share_masks_and_indices():
    calls, packed_forward = [], PackedForward(Pack(), {}, "sdpa")

    def make(value):
        calls.append(value)
        return [value]

    first, other, again = (packed_forward.cached(make, value) for value in [1, 2, 1])
    assert calls == [1, 2]
    assert first is again
    assert other == [2]


# What packs cannot express


def attend_once(module, times=1, backbone_is_causal=True, **kwargs):
    [pack] = make_packs("one text")
    states = normal(1, 2, len(pack), SIZE, seed=0)
    packed_forward = PackedForward(pack, {}, "sdpa", is_causal=backbone_is_causal)
    for _ in range(times):
        packed_forward.attend(module, states, states, states, **kwargs)
    return packed_forward


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_arguments_that_packs_cannot_express_are_refused(name):
    attend_once(nn.Module(), **{name: None})
    with pytest.raises(PackingError, match=name):
        attend_once(nn.Module(), **{name: torch.ones(2)})


def test_dropout_is_refused():
    attend_once(nn.Module(), dropout=0.0)
    with pytest.raises(PackingError, match="dropout"):
        attend_once(nn.Module(), dropout=0.1)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_module_that_attends_otherwise_than_the_backbone_is_refused(is_causal):
    module = nn.Module()
    module.is_causal = not is_causal
    with pytest.raises(PackingError, match="attention direction"):
        attend_once(module, backbone_is_causal=is_causal)
    # An argument of the call overrides the module.
    attend_once(module, backbone_is_causal=is_causal, is_causal=is_causal)
    with pytest.raises(PackingError, match="attention direction"):
        attend_once(module, backbone_is_causal=not is_causal, is_causal=is_causal)


def test_several_attentions_in_one_module_are_refused():
    with pytest.raises(PackingError, match="several"):
        attend_once(nn.Module(), times=2)


def test_a_window_that_is_only_in_the_mask_is_refused():
    module = nn.Module()
    module.config = SimpleNamespace(sliding_window=4)
    with pytest.raises(PackingError, match="mask"):
        attend_once(module)
    attend_once(module, sliding_window=4)
    module.config.layer_types = ["full_attention"]
    attend_once(module)


def test_layers_that_never_attend_are_noticed():
    packed_forward = attend_once(nn.Module())
    with pytest.raises(PackingError, match="attention interface"):
        packed_forward.finish(num_layers=2)
    packed_forward.finish(num_layers=1)


def test_after_the_forward_pass_modules_may_attend_again():
    """As layers do that a backward pass recomputes; the prefix KV cache is left alone."""
    [pack, *_] = make_packs("carried")
    packed_forward, module = PackedForward(pack, {}, "sdpa"), nn.Module()
    states = normal(1, 2, len(pack), SIZE, seed=0)
    first, _ = packed_forward.attend(module, states, states, states)
    carried = packed_forward.carry_over[0]
    packed_forward.finish(num_layers=1)
    for _ in range(2):
        recomputed, _ = packed_forward.attend(module, states, states, states)
        assert torch.equal(recomputed, first)
    assert packed_forward.carry_over[0] is carried


# The registered attention functions


@pytest.fixture
def registered():
    """The attention function registered as `sdpa`, which takes packed forward passes."""
    accept_packed_forward("sdpa")
    return AttentionInterface()["sdpa"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_without_a_packed_forward_it_is_the_same_function(registered, groups, mask):
    module = nn.Module()
    module.num_key_value_groups = groups
    query = normal(2, 4, 9, SIZE, seed=0, dtype=torch.float32)
    key, value = (normal(2, 4 // groups, 9, SIZE, seed=seed, dtype=torch.float32) for seed in (1, 2))
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :4] = False
    if mask is not None:
        make_mask = {"boolean": sdpa_mask, "additive": eager_mask}[mask]
        mask = make_mask(batch_size=2, q_length=9, kv_length=9, attention_mask=padding)
    kwargs = {"scaling": 0.4, "sliding_window": 3, "dropout": 0.0}
    output, _ = registered(module, query, key, value, mask, **kwargs)
    assert torch.equal(output, sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0])


def test_a_packed_forward_is_of_its_call_alone(registered):
    """A plain call in another thread, or in between, is not packed."""
    [pack] = make_packs("prefix")
    states, outputs = normal(1, 2, len(pack), SIZE, seed=0), []

    def call_plainly():
        outputs.append(registered(nn.Module(), states, states, states, None)[0])

    packed_forward = PackedForward(pack, {}, "sdpa")
    packed, _ = registered(nn.Module(), states, states, states, None, packed_forward=packed_forward)
    thread = threading.Thread(target=call_plainly)
    thread.start()
    thread.join()
    call_plainly()
    assert torch.equal(outputs[0], sdpa_attention_forward(nn.Module(), states, states, states, None)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], packed)


def test_the_keyword_is_taught_once(registered):
    accept_packed_forward("sdpa")
    assert AttentionInterface()["sdpa"] is registered


@pytest.mark.parametrize("implementation", ["eager", "no_such_attention"])
def test_unregistered_attention_is_refused(implementation):
    with pytest.raises(PackingError, match=f"{implementation} attention"):
        accept_packed_forward(implementation)


def test_a_model_that_drops_the_keyword_is_noticed(registered):
    states = normal(1, 2, 3, SIZE, seed=0)
    with pytest.raises(NotImplementedError, match="packed_forward"):
        registered(nn.Module(), states, states, states, torch.empty(PLACEHOLDER_MASK_SHAPE))
