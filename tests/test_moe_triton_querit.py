"""The kernels against a loop in float64: on a GPU where there is one, in Triton's interpreter otherwise."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import CUDA, DEVICE, SOURCE, load_copy, triton_module
from transformers.dynamic_module_utils import get_imports, get_relative_imports

pytest.importorskip("triton")

# The interpreter gives garbage for products of bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def moe():
    with triton_module() as module:
        yield module


def slow_experts(hidden_states, gate_up, down, top_k_index, top_k_weights):
    rows = []
    for token, x in enumerate(hidden_states):
        row = torch.zeros_like(x)
        for expert, weight in zip(top_k_index[token].tolist(), top_k_weights[token], strict=True):
            gate, up = (gate_up[expert] @ x).chunk(2)
            row = row + weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else hidden_states * 1


def make_index(tokens, experts, choices, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]
        or [torch.empty(0, dtype=torch.long)]
    ).reshape(tokens, choices)


def make_layer(index, experts=6, hidden=48, inner=40, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    layer = [normal(len(index), hidden), normal(experts, 2 * inner, hidden) / 6, normal(experts, hidden, inner) / 6]
    weights = torch.rand(index.shape, generator=generator)
    return *(tensor.to(DEVICE, dtype) for tensor in layer), index.to(DEVICE), weights.to(DEVICE)


def run(moe, layer, grad_output):
    output, saved = moe.experts_forward(*layer, for_backward=True)
    return output, *moe.experts_backward(grad_output, saved, *layer)


def check(moe, layer, grad_output=None):
    if grad_output is None:
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(layer[0].shape, generator=generator).to(layer[0])
    index, floats = layer[3], [layer[place].double().requires_grad_() for place in (0, 1, 2, 4)]
    expected = slow_experts(*floats[:3], index, floats[3])
    gradients = torch.autograd.grad(expected, floats, grad_output.double(), materialize_grads=True, allow_unused=True)
    results = run(moe, layer, grad_output)
    likes = [layer[place] for place in (0, 0, 1, 2, 4)]
    for tensor, exact, like in zip(results, [expected, *gradients], likes, strict=True):
        assert tensor.dtype == like.dtype
        assert tensor.shape == like.shape
        if tensor.numel():
            tolerance = max(TOLERANCES.get(dtype, 0) for dtype in (layer[0].dtype, like.dtype))
            atol = tolerance * exact.abs().max().item()
            torch.testing.assert_close(tensor.double(), exact.detach(), rtol=0, atol=atol)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_loop_in_output_and_gradients(moe, dtype):
    check(moe, make_layer(make_index(37, 6, 3), dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_take_several_large_tiles(moe, dtype):
    blocks = moe.choose_blocks(150, dtype)
    sizes = {"hidden": blocks.n + 8, "inner": blocks.n // 2 + 8}
    assert blocks.m in (64, 128)
    check(moe, make_layer(make_index(150, 2, 2), experts=2, dtype=dtype, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "experts", "choices"),
    [(1, 6, 3), (1, 1, 1), (9, 6, 1), (7, 5, 5), (0, 6, 3), (40, 1, 1)],
    ids=["one token", "one of all", "one choice", "every expert", "no token", "one expert"],
)
def test_extremes_of_routing(moe, tokens, experts, choices):
    check(moe, make_layer(make_index(tokens, experts, choices), experts=experts))


@pytest.mark.slow
def test_experts_without_tokens_get_zero_gradients(moe):
    _, _, grad_gate_up, grad_down, _ = check(moe, make_layer(1 + 2 * make_index(20, 3, 2), experts=8))
    for grad in (grad_gate_up, grad_down):
        assert [bool(expert.any()) for expert in grad.cpu()] == [False, True, False, True, False, True, False, False]


@pytest.mark.slow
def test_all_tokens_on_one_expert(moe):
    check(moe, make_layer(torch.full((70, 1), 4), experts=6))


@pytest.mark.slow
def test_an_expert_chosen_twice_by_a_token_counts_twice(moe):
    check(moe, make_layer(torch.tensor([[2, 2, 0], [1, 2, 1]]), experts=3))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [torch.float16, torch.float64])
def test_weights_keep_a_dtype_of_their_own(moe, weights):
    *layer, router = make_layer(make_index(11, 6, 3))
    check(moe, (*layer, router.to(weights)))


@pytest.mark.slow
def test_reads_what_is_not_contiguous(moe):
    hidden_states, gate_up, down, index, weights = make_layer(make_index(13, 6, 3))
    layer = (
        torch.stack([hidden_states, -hidden_states], dim=-1)[..., 0],
        gate_up.mT.contiguous().mT,
        down.mT.contiguous().mT,
        index.T.contiguous().T,
        weights.T.contiguous().T,
    )
    assert not any(tensor.is_contiguous() for tensor in layer)
    check(moe, layer, grad_output=torch.ones(1, device=DEVICE).expand(13, 48))


@pytest.mark.slow
@settings(max_examples=12, derandomize=True, deadline=None)
@given(st.data())
def test_equals_the_loop_for_any_shape(moe, data):
    experts = data.draw(st.integers(1, 9), "experts")
    choices = data.draw(st.integers(1, experts), "choices")
    tokens = data.draw(st.integers(0, 24), "tokens")
    chosen = st.lists(st.integers(0, experts - 1), min_size=choices, max_size=choices)
    index = data.draw(st.lists(chosen, min_size=tokens, max_size=tokens), "index")
    sizes = {name: data.draw(st.integers(1, 70), name) for name in ("hidden", "inner")}
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    layer = make_layer(torch.tensor(index, dtype=torch.long).reshape(tokens, choices), experts, dtype=dtype, **sizes)
    check(moe, layer)


@pytest.mark.slow
def test_equal_inputs_give_equal_bits(moe):
    layer = make_layer(make_index(37, 6, 3), dtype=torch.float16)
    grad_output = torch.randn_like(layer[0])
    first, second = (run(moe, layer, grad_output) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.slow
def test_keeps_nothing_for_inference(moe):
    layer = make_layer(make_index(12, 6, 2))
    output, saved = moe.experts_forward(*layer)
    assert torch.equal(output, moe.experts_forward(*layer, for_backward=True)[0])
    with pytest.raises(ValueError, match="for_backward=True"):
        moe.experts_backward(output, saved, *layer)


@pytest.mark.slow
def test_computes_the_gradients_needed(moe):
    layer = make_layer(make_index(12, 6, 2))
    output, saved = moe.experts_forward(*layer, for_backward=True)
    every = moe.experts_backward(output, saved, *layer)
    for needed in [(), (0,), (1,), (2,), (3,), (0, 3), (1, 2)]:
        needs = tuple(place in needed for place in range(4))
        for place, grad in enumerate(moe.experts_backward(output, moe.Saved(*saved), *layer, needs)):
            assert grad is None if place not in needed else torch.equal(grad, every[place]), (needed, place)


@pytest.mark.slow
def test_never_waits_for_the_device(moe, monkeypatch):
    layer = make_layer(make_index(12, 6, 2))
    run(moe, layer, layer[0])

    def fail(*_):
        raise AssertionError("a value was asked of the device")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        run(moe, layer, layer[0])
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "experts", "choices"),
    [(37, 6, 3), (2000, 5, 3), (1, 4, 1), (0, 4, 2)],
    ids=["few", "over one block", "one", "none"],
)
def test_routing_sorts_by_expert_and_keeps_the_order_of_tokens(moe, tokens, experts, choices, block_m):
    # One expert more than is ever chosen, and not the last.
    index = make_index(tokens, experts, choices)
    index = index + (index > 1)
    slots, starts, tile_experts, _ = (
        None if tensor is None else tensor.tolist()
        for tensor in moe.sort_by_expert(index.to(DEVICE), experts + 1, block_m)
    )
    chosen = index.flatten().tolist()
    assert starts[0] == 0
    assert sorted(slot for slot in slots if slot >= 0) == list(range(len(chosen)))
    for expert in range(experts + 1):
        group = slots[starts[expert] : starts[expert + 1]]
        expected = [assignment for assignment, choice in enumerate(chosen) if choice == expert]
        assert len(group) == -(-len(expected) // block_m) * block_m
        assert group == expected + [-1] * (len(group) - len(expected))
        assert set(tile_experts[starts[expert] // block_m : starts[expert + 1] // block_m]) <= {expert}
    assert set(slots[starts[-1] :]) <= {-1}


@pytest.mark.parametrize("shared_memory", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_blocks_grow_with_the_rows_and_fit(moe, dtype, shared_memory):
    blocks = [moe.choose_blocks(rows, dtype, shared_memory) for rows in (0, 0.5, 16, 17, 40, 64.5, 1e6, float("inf"))]
    assert blocks[0].m == 16
    assert blocks == sorted(blocks, key=lambda tile: (tile.m, tile.n))
    for tile in blocks:
        assert (tile.m + tile.n) * tile.k * dtype.itemsize * tile.stages <= shared_memory
        assert all(size & (size - 1) == 0 for size in tile[:4])
        assert 1 <= tile.stages <= 4


def test_misfits_are_named(moe):
    hidden_states, gate_up, down, index, weights = make_layer(make_index(5, 6, 2))
    for layer in [
        (hidden_states[:4], gate_up, down, index, weights),
        (hidden_states[:, :9], gate_up, down, index, weights),
        (hidden_states, gate_up.mT, down, index, weights),
        (hidden_states, gate_up[:, 1:], down, index, weights),
        (hidden_states, gate_up, down[:3], index, weights),
        (hidden_states, gate_up, down[0], index, weights),
        (hidden_states, gate_up, down, index[:, 0], weights[:, 0]),
        (hidden_states, gate_up, down, index, weights[:, :1]),
    ]:
        with pytest.raises(ValueError, match=r"give \(T, H\)"):
            moe.experts_forward(*layer)
    for layer in [
        (hidden_states.half(), gate_up, down, index, weights),
        (hidden_states.double(), gate_up.double(), down.double(), index, weights),
    ]:
        with pytest.raises(ValueError, match="dtypes"):
            moe.experts_forward(*layer)


def test_is_available_where_its_kernels_run(moe):
    assert moe.is_available(DEVICE)
    assert moe.is_available(torch.device("cpu")) is not CUDA


def test_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = load_copy("moe_without_triton")
    assert not module.is_available(torch.device("cpu"))
    assert not module.is_available(torch.device("cuda"))


def test_a_copy_beside_a_checkpoint_does_not_ask_for_triton():
    assert get_relative_imports(SOURCE) == []
    assert "triton" not in get_imports(SOURCE)
