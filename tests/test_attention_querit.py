"""Attention within packs, beside a plain softmax over explicit masks in float64."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from modeling_querit import attention_querit
from modeling_querit.attention_querit import CURRENT_RUN, NAME, CannotPack, Run, packed_attention
from modeling_querit.packing_querit import Pack, plan_packs

SIZE = 8
WAYS = ["each", "together", "flash"]
# Lengths of prefix and pairs of each group, and the tokens of a pack.
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
WINDOWS = [None, 1, 3, 140]


def make_packs(layout):
    groups, batch_tokens = LAYOUTS[layout]
    input_ids, members = [], []
    for number, (prefix, lengths) in enumerate(groups):
        members.append(range(len(input_ids), len(input_ids) + len(lengths)))
        # No two pairs go on alike.
        input_ids += [[number] * prefix + [10 + pair] * length for pair, length in enumerate(lengths)]
    return list(plan_packs(input_ids, members, batch_tokens))


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax_attention(query, key, value, may_attend, scaling):
    """(queries, heads, size) in float64; keys and values may have fewer heads."""
    query, key, value = (each[0].double() for each in (query, key, value))
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    weights = (query @ key.transpose(1, 2) * scaling).masked_fill(~may_attend, float("-inf"))
    return (weights.softmax(-1) @ value).transpose(0, 1)


def explicit_mask(pack, window):
    """(rows, keys): the keys of its pair up to itself, the last `window` of them."""
    mask = torch.zeros(len(pack), pack.carried + len(pack), dtype=torch.bool)
    for text in pack.texts:
        keys = list(range(text.prefix.start, text.prefix.stop))
        for row in range(text.rows.start, text.rows.stop):
            keys.append(pack.carried + row)
            mask[row, keys[-window:] if window else keys] = True
    return mask


def flash_attention(query, key, value, attention_mask, *, softmax_scale, sliding_window, **kwargs):
    """As transformers' flash attention computes variable lengths: causal, aligned at the last query and key."""
    assert attention_mask is None
    assert kwargs["is_causal"]
    assert kwargs["attn_implementation"] == "flash_attention_2"
    assert query.shape[3] == key.shape[3] == value.shape[3]
    assert kwargs["query_length"] == query.shape[1]
    ends = [kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]]
    assert {each.dtype for each in ends} == {torch.int32}
    queries, keys = (each.diff().tolist() for each in ends)
    assert (max(queries), max(keys)) == (kwargs["max_length_q"], kwargs["max_length_k"])
    assert (sum(queries), sum(keys)) == (query.shape[1], key.shape[1])
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    outputs = []
    for of_query, of_key, of_value in zip(
        query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True
    ):
        last = torch.arange(of_query.shape[2]).unsqueeze(1) + of_key.shape[2] - of_query.shape[2]
        place = torch.arange(of_key.shape[2])
        mask = (place <= last) & (place > last - (sliding_window or of_key.shape[2]))
        outputs.append(softmax_attention(of_query, of_key, of_value, mask, softmax_scale))
    return torch.cat(outputs).unsqueeze(0).to(query.dtype)


@pytest.fixture
def attend(monkeypatch):
    """Sends packs through an attention module, one after another: outputs, and what they should be."""
    monkeypatch.setattr(attention_querit, "_flash_attention_forward", flash_attention)

    def run_all(packs, way, *, window=None, heads=4, groups=1, value_size=SIZE, dtype=torch.float64):
        if way == "together":
            monkeypatch.setattr(attention_querit, "_attend_each", attention_querit._attend_together)
        module, states, kept = nn.Module(), {}, None
        module.layer_idx = 7
        implementation = "flash_attention_2" if way == "flash" else "sdpa"
        for seed, pack in enumerate(packs):
            shapes = [(heads, SIZE), (heads // groups, SIZE), (heads // groups, value_size)]
            query, key, value = (
                normal(1, count, len(pack), size, seed=3 * seed + place, dtype=dtype)
                for place, (count, size) in enumerate(shapes)
            )
            run = Run(pack, states, implementation, last_layer=7 if way == "last rows" else 3)
            token = CURRENT_RUN.set(run)
            try:
                output, weights = packed_attention(
                    module, query, key, value, None, scaling=0.4, sliding_window=window, dropout=0.0
                )
            finally:
                CURRENT_RUN.reset(token)
            assert weights is None
            assert output.dtype == dtype
            assert output.shape == (1, len(pack), heads, value_size)
            states = run.kept
            if pack.carried:
                key, value = torch.cat((kept[0], key), 2), torch.cat((kept[1], value), 2)
            kept = key[:, :, pack.keeps], value[:, :, pack.keeps]
            yield pack, output[0], softmax_attention(query, key, value, explicit_mask(pack, window), 0.4)

    return run_all


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_attends_within_each_pair(attend, way, layout, window):
    packs = make_packs(layout)
    assert any(pack.carried for pack in packs) == ("carried" in layout)
    for _, output, expected in attend(packs, way, window=window):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 4])
def test_the_last_rows_only(attend, layout, window, groups):
    for pack, output, expected in attend(make_packs(layout), "last rows", window=window, groups=groups):
        torch.testing.assert_close(output[pack.read_rows], expected[pack.read_rows], rtol=0, atol=1e-12)
        others = sorted(set(range(len(pack))) - set(pack.read_rows))
        assert not output[others].any()


@pytest.mark.parametrize("way", [*WAYS, "last rows"])
@pytest.mark.parametrize("layout", ["prefixes", "carried from the middle", "long and carried"])
@pytest.mark.parametrize(("heads", "groups", "value_size"), [(4, 2, SIZE), (4, 4, SIZE), (2, 1, 5), (6, 3, 5)])
def test_grouped_heads_and_small_values(attend, way, layout, heads, groups, value_size):
    sizes = {"heads": heads, "groups": groups, "value_size": value_size}
    for pack, output, expected in attend(make_packs(layout), way, **sizes):
        rows = pack.read_rows if way == "last rows" else slice(None)
        torch.testing.assert_close(output[rows], expected[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", [*WAYS, "last rows"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
@pytest.mark.parametrize("value_size", [SIZE, 5])
def test_dtypes(attend, way, dtype, tolerance, value_size):
    packs = make_packs("long and carried")
    for pack, output, expected in attend(packs, way, window=100, dtype=dtype, value_size=value_size):
        rows = pack.read_rows if way == "last rows" else slice(None)
        torch.testing.assert_close(output[rows].double(), expected[rows], rtol=0, atol=tolerance)


def test_what_is_kept_is_a_copy():
    """Else the states of a whole pack would stay in memory with those of its prefix."""
    [pack, *_] = make_packs("carried")
    run, module = Run(pack, {}, "sdpa", None), nn.Module()
    states = normal(1, 2, len(pack), SIZE, seed=0)
    token = CURRENT_RUN.set(run)
    try:
        packed_attention(module, states, states, states, None)
    finally:
        CURRENT_RUN.reset(token)
    key, value = run.kept[module]
    assert key.shape[2] == 5
    assert key.untyped_storage().nbytes() == value.untyped_storage().nbytes() == key.numel() * 8


def test_layers_share_what_is_made():
    made, run = [], Run(Pack(), {}, "sdpa", None)

    def make(value):
        made.append(value)
        return [value]

    first, other, again = (run.made_once(make, value) for value in [1, 2, 1])
    assert made == [1, 2]
    assert first is again
    assert other == [2]


# What packs cannot express


def in_run(module, times=1, **kwargs):
    [pack] = make_packs("one text")
    states = normal(1, 2, len(pack), SIZE, seed=0)
    token = CURRENT_RUN.set(Run(pack, {}, "sdpa", None))
    try:
        for _ in range(times):
            packed_attention(module, states, states, states, None, **kwargs)
    finally:
        CURRENT_RUN.reset(token)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_packs_cannot_express(name):
    in_run(nn.Module(), **{name: None})
    with pytest.raises(CannotPack, match=name):
        in_run(nn.Module(), **{name: torch.ones(2)})


def test_attention_to_later_tokens():
    module = nn.Module()
    module.is_causal = False
    with pytest.raises(CannotPack, match="later"):
        in_run(module)
    in_run(module, is_causal=True)
    with pytest.raises(CannotPack, match="later"):
        in_run(nn.Module(), is_causal=False)


def test_several_attentions_in_one_module():
    with pytest.raises(CannotPack, match="several"):
        in_run(nn.Module(), times=2)


def test_a_window_that_only_the_mask_knows_of():
    module = nn.Module()
    module.config = SimpleNamespace(sliding_window=4)
    with pytest.raises(CannotPack, match="mask"):
        in_run(module)
    in_run(module, sliding_window=4)
    module.config.layer_types = ["full_attention"]
    in_run(module)


# Outside a run


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_outside_a_run_it_is_sdpa(groups, mask):
    module = nn.Module()
    module.num_key_value_groups = groups
    query = normal(2, 4, 9, SIZE, seed=0, dtype=torch.float32)
    key, value = (normal(2, 4 // groups, 9, SIZE, seed=seed, dtype=torch.float32) for seed in (1, 2))
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :4] = False
    if mask is not None:
        make = {"boolean": sdpa_mask, "additive": eager_mask}[mask]
        mask = make(batch_size=2, q_length=9, kv_length=9, attention_mask=padding)
    kwargs = {"scaling": 0.4, "sliding_window": 3, "dropout": 0.0}
    output, _ = packed_attention(module, query, key, value, mask, **kwargs)
    assert torch.equal(output, sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0])


def test_a_run_is_of_its_thread():
    [pack] = make_packs("prefix")
    states, outputs = normal(1, 2, len(pack), SIZE, seed=0), []

    def plain():
        outputs.append(packed_attention(nn.Module(), states, states, states, None)[0])

    token = CURRENT_RUN.set(Run(pack, {}, "sdpa", None))
    try:
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
        plain()
    finally:
        CURRENT_RUN.reset(token)
    assert torch.equal(outputs[0], sdpa_attention_forward(nn.Module(), states, states, states, None)[0])
    assert not torch.allclose(outputs[0], outputs[1])


def test_it_is_registered():
    assert AttentionInterface()[NAME] is packed_attention
