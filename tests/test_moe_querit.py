"""Experts sorted and grouped against transformers' own loop over them, in float64."""

import copy
import importlib
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, triton_module
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModel, DeepseekV3Config, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from modeling_querit import moe_querit
from modeling_querit.mixed_precision_querit import ComputeDtypes, Float32Arithmetic
from modeling_querit.moe_querit import EXPERTS_IMPLEMENTATION, querit_experts_forward

EXPERTS, HIDDEN, INNER = 6, 24, 20
# Class of the experts, its configuration's, and what they call the numbers above.
LAYOUTS = {
    "deepseek_v3": ("DeepseekV3", "Config", {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "qwen3_moe": ("Qwen3Moe", "Config", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "mixtral": ("Mixtral", "Config", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    # Biases, (in, out), a gate of its own.
    "gpt_oss": ("GptOss", "Config", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    # (in, out) without biases.
    "aria": ("Aria", "TextConfig", {"moe_num_experts": EXPERTS, "intermediate_size": INNER, "num_attention_heads": 1}),
    # No gate.
    "nemotron_h": ("NemotronH", "Config", {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
    # A norm after each expert.
    "muse_spark": ("MuseSpark", "TextConfig", {"num_local_experts": EXPERTS, "moe_intermediate_size": INNER}),
}
WIDTHS = {"muse_spark": "moe_hidden_size"}
ROUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_experts(layout="deepseek_v3", dtype=torch.float32):
    name, config, sizes = LAYOUTS[layout]
    module = pytest.importorskip(f"transformers.models.{layout}.modeling_{layout}")
    config = getattr(importlib.import_module(f"transformers.models.{layout}"), name + config)
    experts = getattr(module, f"{name}Experts")(config(**{WIDTHS.get(layout, "hidden_size"): HIDDEN}, **sizes))
    if len(inspect.signature(experts.forward).parameters) != 3:
        pytest.skip(f"the experts of {layout} do not go through the registry in this version of transformers")
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.3).to(dtype)
    experts.config._experts_implementation = EXPERTS_IMPLEMENTATION
    return experts


def make_index(tokens, choices, experts=EXPERTS):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices]
    assert index.shape == (tokens, choices)
    return index


def make_layer(index, dtype=torch.float32, seed=0):
    """Hidden states, experts and their weights for these choices."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(len(index), HIDDEN, generator=generator).to(dtype)
    return hidden_states, index, torch.rand(index.shape, generator=generator)


ROUTINGS = {
    "ordinary": make_index(37, 3),
    "some experts idle": 1 + 2 * make_index(20, 2, experts=3),
    "neighbours idle": 2 + make_index(20, 2, experts=2),
    "one busier than all others": torch.cat([make_index(9, 2), torch.tensor([[3, 1]]).expand(40, 2)]),
    "one token": make_index(1, 3),
    "all tokens on one expert": torch.full((30, 1), 4),
    "one choice": make_index(25, 1),
    "every expert": make_index(9, EXPERTS),
    "an expert chosen twice": torch.tensor([[2, 2, 0], [1, 2, 1], [5, 5, 5]]),
}


@pytest.fixture(params=[1, 4], ids=["one core", "four cores"])
def cores(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@pytest.fixture
def choose(monkeypatch):
    """Sets whether float32 counts as faster than bfloat16."""

    def arithmetic(faster, dtype):
        return ComputeDtypes(torch.float32, torch.float32 if faster and dtype == torch.bfloat16 else dtype)

    return lambda faster: monkeypatch.setattr(moe_querit, "fastest_dtypes", lambda _, dtype: arithmetic(faster, dtype))


def eager(experts, layer):
    """transformers' loop, in float64."""
    exact = copy.deepcopy(experts).double()
    exact.config._experts_implementation = "eager"
    hidden_states, index, weights = layer
    return exact, (hidden_states.double(), index, weights.double())


def compute(experts, layer, needed=None):
    """Output and gradients of hidden states, router weights and parameters (those `needed`, or all)."""
    hidden_states, index, weights = (tensor.detach() for tensor in layer)
    named = {"hidden_states": hidden_states, "weights": weights, **dict(experts.named_parameters())}
    needed = list(named) if needed is None else needed
    for name, tensor in named.items():
        tensor.requires_grad_(name in needed)
    output = experts(hidden_states, index, weights)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    inputs = [named[name] for name in needed]
    grads = torch.autograd.grad(output, inputs, grad_output, allow_unused=True, materialize_grads=True)
    for name, grad in zip(needed, grads, strict=True):
        assert grad.dtype == named[name].dtype
    return {"output": output.detach(), **dict(zip(needed, grads, strict=True))}


def assert_near(result, exact, tolerance):
    """The largest difference is at most this share of the largest magnitude."""
    assert result.shape == exact.shape
    difference = (result.double() - exact.double()).abs().max().item()
    assert difference <= tolerance * exact.abs().max().item()


def check(experts, layer):
    """Output and gradients against the loop, and the output in place against that for autograd."""
    dtype = layer[0].dtype
    exact, ours = compute(*eager(experts, layer)), compute(experts, layer)
    assert ours["output"].dtype == dtype
    for name, tensor in exact.items():
        assert_near(ours[name], tensor, ROUND[ours[name].dtype])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = experts(*layer)
        assert output.dtype == dtype
        assert not output.requires_grad
        assert_near(output, ours["output"], ROUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_loop_in_output_and_gradients(routing, dtype, cores):
    check(make_experts(dtype=dtype), make_layer(ROUTINGS[routing], dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop_of_other_models(layout, cores):
    check(make_experts(layout), make_layer(ROUTINGS["ordinary"]))


@pytest.mark.parametrize("routing", ["ordinary", "an expert chosen twice"])
def test_equals_a_plain_loop(routing):
    experts = make_experts(dtype=torch.float64)
    layer = make_layer(ROUTINGS[routing], torch.float64)
    expected = torch.zeros_like(layer[0])
    for token, (x, index, weights) in enumerate(zip(*layer, strict=True)):
        for expert, weight in zip(index.tolist(), weights.tolist(), strict=True):
            gate, up = (experts.gate_up_proj[expert].detach() @ x).chunk(2)
            expected[token] += weight * (experts.down_proj[expert].detach() @ (gate * torch.sigmoid(gate) * up))
    assert_near(compute(experts, layer)["output"], expected, 1e-12)


def test_reads_what_is_not_contiguous(cores):
    hidden_states, index, weights = make_layer(ROUTINGS["ordinary"])
    hidden_states = torch.stack([hidden_states, -hidden_states], dim=-1)[..., 0]
    layer = (hidden_states, index.T.contiguous().T, weights.T.contiguous().T)
    experts = make_experts()
    for parameter in experts.parameters():
        parameter.data = parameter.data.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in (*layer, *experts.parameters()))
    check(experts, layer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_tokens_give_no_output(layout, context):
    with context():
        output = make_experts(layout)(*make_layer(make_index(0, 3)))
    assert output.shape == (0, HIDDEN)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_computes_any_gradient_by_itself(layout):
    experts, layer = make_experts(layout), make_layer(ROUTINGS["ordinary"])
    every = compute(experts, layer)
    for name in list(every)[1:]:
        assert_near(compute(experts, layer, [name])[name], every[name], 1e-6)


def test_without_a_gradient_to_compute_nothing_is_results(monkeypatch):
    monkeypatch.setattr(moe_querit, "_forward_for_backward", None)
    experts, layer = make_experts().requires_grad_(False), make_layer(ROUTINGS["ordinary"])
    assert not experts(*layer).requires_grad


class Adapter(torch.nn.Module):
    """Adds to a weight, as adapters do, without a parameter of its own."""

    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def forward(self, weight):
        return weight + self.delta


def test_gradients_reach_adapters():
    layer, grads = make_layer(ROUTINGS["ordinary"]), []
    for implementation in (EXPERTS_IMPLEMENTATION, "eager"):
        experts = make_experts().requires_grad_(False)
        experts.config._experts_implementation = implementation
        factor = torch.full((EXPERTS, 2 * INNER, 1), 0.1, requires_grad=True)
        delta = factor * torch.linspace(-1, 1, HIDDEN)
        parametrize.register_parametrization(experts, "gate_up_proj", Adapter(delta))
        experts(*layer).square().sum().backward()
        grads.append(factor.grad)
    assert_near(*grads, 1e-5)


def test_a_second_call_leaves_the_first_result_alone(monkeypatch):
    monkeypatch.setattr(moe_querit, "_buffers", threading.local())
    experts, results = make_experts(), []
    # Larger, smaller, in this context or that: memory of one call has to do for the next.
    for tokens, context in enumerate([torch.inference_mode, torch.no_grad, torch.enable_grad] * 3):
        layer = make_layer(make_index(5 + 7 * tokens % 20, 3), seed=tokens)
        with context():
            output = experts.requires_grad_(False)(*layer)
        buffers = {buffer.untyped_storage().data_ptr() for buffer in vars(moe_querit._buffers).values()}
        assert buffers
        assert output.untyped_storage().data_ptr() not in buffers
        results.append((output, output.clone(), layer))
    for output, then, layer in results:
        assert torch.equal(output, then)
        exact, exact_layer = eager(experts, layer)
        assert_near(output, exact(*exact_layer), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_disturb_each_other(dtype, choose):
    choose(True)
    experts = make_experts(dtype=dtype)
    layers = [make_layer(make_index(tokens, 3), dtype, seed=tokens) for tokens in (70, 90)]
    with torch.inference_mode():
        expected = [experts(*layer) for layer in layers]
    barrier = threading.Barrier(2)

    @torch.inference_mode()
    def call(layer):
        barrier.wait()
        return [experts(*layer) for _ in range(30)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(call, layers))
    for outputs, exact in zip(results, expected, strict=True):
        assert all(torch.equal(output, exact) for output in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_equal_bits(dtype, cores, choose):
    choose(True)
    experts, layer = make_experts(dtype=dtype), make_layer(make_index(70, 3), dtype)
    first, second = (compute(experts, layer) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(experts(*layer), experts(*layer))


@pytest.mark.slow
@pytest.mark.parametrize("faster", [False, True], ids=["bfloat16 is faster", "float32 is faster"])
@pytest.mark.parametrize(("tokens", "many"), [(95, False), (96, True)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_no_less_exact_than_in_the_loop(layout, tokens, many, faster, cores, choose, monkeypatch):
    choose(faster)
    converted = []
    convert = moe_querit._converted
    monkeypatch.setattr(moe_querit, "_converted", lambda *args: converted.append(args[2]) or convert(*args))
    assert many == (tokens * 3 >= moe_querit._ROWS_WORTH_CONVERTING * EXPERTS)
    experts = make_experts(layout, torch.bfloat16)
    layer = make_layer(make_index(tokens, 3), torch.bfloat16)
    exact = compute(*eager(experts, layer))
    ours = compute(experts, layer)
    with torch.no_grad():
        in_place = experts(*layer)
    assert set(converted) == ({torch.float32} if many and faster else set())
    experts.config._experts_implementation = "eager"
    loop = compute(experts, layer)
    assert in_place.dtype == torch.bfloat16

    def error(tensor, name):
        return (tensor.double() - exact[name]).norm().item()

    assert error(in_place, "output") <= 1.02 * error(loop["output"], "output")
    for name in exact:
        assert error(ours[name], name) <= 1.02 * error(loop[name], name)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_sums_in_float32(context):
    experts = make_experts(dtype=torch.bfloat16)
    hidden_states, index, weights = make_layer(torch.full((8, 3), 2), torch.bfloat16)
    weights = weights.bfloat16()
    with context():
        output = experts(hidden_states, index, weights)
        parts = experts(hidden_states.repeat_interleave(3, 0), index.view(24, 1), torch.ones(24, 1)).view(8, 3, HIDDEN)
    assert torch.equal(output, (parts.float() * weights.float().unsqueeze(-1)).sum(1).bfloat16())


@pytest.mark.parametrize("faster", [False, True], ids=["bfloat16 is faster", "float32 is faster"])
@pytest.mark.parametrize("tokens", [20, 70])
@pytest.mark.parametrize("layout", ["deepseek_v3", "gpt_oss"])
def test_float32_meets_bfloat16_weights(layout, tokens, faster, cores, choose):
    choose(faster)
    experts, layer = make_experts(layout, torch.bfloat16), make_layer(make_index(tokens, 3))
    exact = compute(*eager(experts, layer))
    with Float32Arithmetic():
        ours = compute(experts, layer)
        with torch.inference_mode():
            in_place = experts(*layer)
    for name, tensor in ours.items():
        stored = name not in ("output", "hidden_states", "weights")
        # Gradients are rounded as the weights are.
        assert_near(tensor, exact[name], 1e-2 if stored else 1e-5)
    assert in_place.dtype == torch.float32
    assert_near(in_place, exact["output"], 1e-5 if faster else ROUND[torch.bfloat16])
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("faster", [False, True], ids=["bfloat16 is faster", "float32 is faster"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_works_under_autocast(layout, faster, cores, choose):
    choose(faster)
    experts, layer = make_experts(layout), make_layer(make_index(70, 3))
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute(experts, layer)
        with torch.no_grad():
            in_place = experts(*layer)
        experts.config._experts_implementation = "eager"
        loop = compute(experts, layer)
    for name, tensor in loop.items():
        assert_near(ours[name], tensor, ROUND[torch.bfloat16])
    assert in_place.dtype == torch.float32
    assert_near(in_place, loop["output"], ROUND[torch.bfloat16])
    if faster:
        assert_near(in_place, compute(*eager(experts, layer))["output"], 1e-5)


def qwen3_moe_config():
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    common = tiny.make_text_config("qwen3").to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return Qwen3MoeConfig(**{name: common[name] for name in names}, initializer_range=0.3, **sizes)


CONFIGS = {"deepseek_v3": lambda: tiny.make_text_config("deepseek_v3"), "qwen3_moe": qwen3_moe_config}


@pytest.fixture
def calls(monkeypatch):
    """The experts modules that the registered function was called with."""
    assert ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION] is querit_experts_forward
    seen = []

    def spy(self, *args):
        seen.append(self)
        return querit_experts_forward(self, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, EXPERTS_IMPLEMENTATION, spy)
    return seen


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_asked_for_it_uses_it(architecture, calls, tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[architecture]()).eval()
    ids = torch.randint(2, 512, (2, 19))
    model.set_experts_implementation("eager")
    expected = model(ids).last_hidden_state
    assert calls == []
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, experts_implementation=EXPERTS_IMPLEMENTATION)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    for backbone in (model, loaded):
        experts = [module for module in backbone.modules() if hasattr(module, "is_concatenated")]
        assert experts
        for context in (torch.enable_grad, torch.inference_mode):
            calls.clear()
            with context():
                output = backbone(ids).last_hidden_state
            assert calls == experts
            assert_near(output, expected, 1e-5)


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 40), "experts")
    choices = draw(st.integers(1, 4), "choices")
    busy = draw(st.lists(st.integers(0, experts - 1), min_size=1, unique=True), "busy")
    # Many tokens for some experts, so that groups differ.
    repeats = draw(st.lists(st.tuples(st.sampled_from(busy), st.integers(0, 30)), max_size=12), "repeats")
    chosen = [expert for expert, times in repeats for _ in range(times)]
    chosen = draw(st.permutations(chosen), "order") + draw(st.lists(st.sampled_from(busy), max_size=40), "more")
    tokens = len(chosen) // choices
    return torch.tensor(chosen[: tokens * choices], dtype=torch.long).view(tokens, choices), experts


@pytest.mark.slow
@settings(max_examples=100, derandomize=True, deadline=None)
@given(routings(), st.booleans(), st.sampled_from([1, 2, 5, 64]))
def test_routing(routing, neighbours, threads):
    index, experts = routing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        groups, source, slots = moe_querit.group_by_expert(index, experts, neighbours)
    counts = torch.bincount(index.flatten(), minlength=experts).tolist()
    assert slots.shape == index.shape
    taken = slots.flatten().tolist()
    assert len(set(taken)) == len(taken)
    assert all(source[slot] == token for token, row in enumerate(slots.tolist()) for slot in row)
    assert not source[[slot for slot in range(len(source)) if slot not in set(taken)]].any()

    grouped = [expert for group in groups for expert in group.experts]
    assert sorted(grouped) == [expert for expert, count in enumerate(counts) if count]
    end = 0
    for members, rows, block in groups:
        assert len(members) <= min(threads, moe_querit._MAX_GROUP)
        assert rows == max(counts[expert] for expert in members)
        assert (block.start, block.stop) == (end, end + rows * len(members))
        for start, expert in zip(range(end, block.stop, rows), members, strict=True):
            # In the order of tokens, so that results do not depend on chance.
            assert slots[index == expert].tolist() == list(range(start, start + counts[expert]))
        end = block.stop
        if neighbours:
            assert members == list(range(members[0], members[-1] + 1))
        needed = sum(counts[expert] for expert in members)
        assert rows * len(members) <= max(needed, moe_querit._MAX_PADDING * needed + 8)
    assert end == len(source)
    if not neighbours:
        assert [counts[expert] for expert in grouped] == sorted(counts[expert] for expert in grouped)


@pytest.fixture(scope="module")
def kernels():
    with triton_module() as module:
        yield module


@pytest.fixture
def joined(kernels, monkeypatch):
    """Runs the kernels in place of "querit"; returns the arguments of each pass."""
    asked = []

    def experts_forward(*args, for_backward=False):
        asked.append(for_backward)
        return kernels.experts_forward(*args, for_backward=for_backward)

    def experts_backward(*args, needs):
        asked.append(needs)
        return kernels.experts_backward(*args, needs=needs)

    monkeypatch.setattr(moe_querit, "experts_forward", experts_forward)
    monkeypatch.setattr(moe_querit, "experts_backward", experts_backward)
    monkeypatch.setattr(moe_querit, "is_available", kernels.is_available)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, EXPERTS_IMPLEMENTATION, moe_querit.triton_experts_forward)
    return asked


def to_device(experts, layer):
    return experts.to(DEVICE), tuple(tensor.to(DEVICE) for tensor in layer)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["ordinary", "some experts idle", "one token", "an expert chosen twice"])
def test_kernels_equal_the_loop(routing, joined):
    check(*to_device(make_experts(), make_layer(ROUTINGS[routing])))
    assert joined == [True, (True,) * 4, False, False]


@pytest.mark.slow
def test_kernels_compute_any_gradient_by_itself(joined):
    experts, layer = to_device(make_experts("qwen3_moe"), make_layer(ROUTINGS["an expert chosen twice"]))
    every = compute(experts, layer)
    for index, name in enumerate(["hidden_states", "gate_up_proj", "down_proj", "weights"]):
        assert torch.equal(compute(experts, layer, [name])[name], every[name])
        assert joined[-2:] == [True, tuple(index == other for other in range(4))]
    joined.clear()
    experts.requires_grad_(False)(*(tensor.detach() for tensor in layer))
    assert joined == [False]


@pytest.mark.slow
def test_kernels_compute_in_the_wider_dtype(joined):
    experts, layer = to_device(make_experts(dtype=torch.float16), make_layer(ROUTINGS["an expert chosen twice"]))
    exact, ours = compute(*eager(experts, layer)), compute(experts, layer)
    for name, tensor in ours.items():
        assert_near(tensor, exact[name], 1e-5 if tensor.dtype == torch.float32 else 1e-3)
    assert joined == [True, (True,) * 4]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="other layouts are transformers' own there")
@pytest.mark.parametrize("layout", ["gpt_oss", "aria", "nemotron_h", "muse_spark"])
def test_layouts_unknown_to_the_kernels_do_without(layout, joined):
    check(make_experts(layout), make_layer(ROUTINGS["ordinary"]))
    assert joined == []


def test_kernels_without_a_gpu_are_an_error():
    experts, layer = make_experts(), make_layer(ROUTINGS["ordinary"])
    experts.config._experts_implementation = moe_querit.TRITON_IMPLEMENTATION
    with pytest.raises(RuntimeError, match=r"'querit_triton' needs Triton and an NVIDIA GPU .* the model is on cpu"):
        experts(*layer)


@pytest.mark.parametrize(("tokens", "expected"), [(95, ["grouped_mm"]), (96, [])], ids=["few rows", "many rows"])
def test_few_rows_of_aligned_weights_are_grouped_mm_s(tokens, expected, choose, monkeypatch):
    """There, transformers' own is fastest on CPUs that are slow at bfloat16."""
    choose(True)
    calls, grouped_mm = [], ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def spy(*args):
        calls.append("grouped_mm")
        return grouped_mm(*args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", spy)
    config = DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=16,
        n_routed_experts=EXPERTS,
        experts_implementation=EXPERTS_IMPLEMENTATION,
    )
    experts = DeepseekV3Experts(config).bfloat16()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    hidden_states = torch.randn(tokens, 32).bfloat16()
    with torch.no_grad():
        output = experts(hidden_states, make_index(tokens, 3), torch.rand(tokens, 3).bfloat16())
    assert calls == expected
    assert output.shape == hidden_states.shape
