import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling_querit import mixed_precision_querit
from modeling_querit.mixed_precision_querit import Float32Arithmetic, Int8Arithmetic, fastest_dtypes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def capabilities(monkeypatch):
    """Sets the capabilities that the processor reports."""
    cached_functions = (mixed_precision_querit._has_matrix_units, mixed_precision_querit._multiplies_bfloat16)
    for function in cached_functions:
        function.cache_clear()
    yield lambda **units: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    for function in cached_functions:
        function.cache_clear()


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_module(kind, dtype):
    modules = {
        "linear": lambda: torch.nn.Linear(24, 40),
        "linear without bias": lambda: torch.nn.Linear(24, 40, bias=False),
        "layer_norm": lambda: torch.nn.LayerNorm(24),
        "layer_norm without bias": lambda: torch.nn.LayerNorm(24, bias=False),
        "layer_norm without weights": lambda: torch.nn.LayerNorm(24, elementwise_affine=False),
        "rms_norm": lambda: torch.nn.RMSNorm(24, eps=1e-6),
    }
    module = modules[kind]()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=seed))
    return module.to(dtype)


KINDS = [
    "linear",
    "linear without bias",
    "layer_norm",
    "layer_norm without bias",
    "layer_norm without weights",
    "rms_norm",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computes_as_if_the_weights_were_float32(kind, dtype):
    module, inputs = make_module(kind, dtype), normal(5, 24, seed=9)
    with Float32Arithmetic():
        output = module(inputs)
    assert {parameter.dtype for parameter in module.parameters()} <= {dtype}
    assert output.dtype == torch.float32
    assert torch.equal(output, module.float()(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_in_bfloat16_are_left_alone(kind):
    module, inputs = make_module(kind, torch.bfloat16), normal(5, 24, dtype=torch.bfloat16)
    with Float32Arithmetic():
        output = module(inputs)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, module(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_bfloat16_leave_all_else_in_float32(kind):
    module, inputs = make_module(kind, torch.bfloat16), normal(5, 24, seed=9)
    with Float32Arithmetic(torch.bfloat16):
        output = module(inputs)
    assert output.dtype == torch.float32
    if kind.startswith("linear"):
        assert torch.equal(output, module(inputs.bfloat16()).float())
    else:
        assert torch.equal(output, module.float()(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_another_dtype_are_multiplied_in_float32(dtype):
    module, inputs = make_module("linear", dtype), normal(5, 24, seed=9)
    mixed = make_module("linear", torch.bfloat16).to(torch.bfloat16)
    mixed.bias.data = mixed.bias.data.float()
    with Float32Arithmetic(torch.bfloat16):
        output, of_mixed = module(inputs), mixed(inputs)
    assert torch.equal(output, module.float()(inputs))
    assert torch.equal(of_mixed, mixed.float()(inputs))


def test_names_of_arguments_make_no_difference():
    module, inputs = make_module("linear", torch.bfloat16), normal(5, 24)
    with Float32Arithmetic():
        outputs = [
            F.linear(inputs, module.weight, module.bias),
            F.linear(inputs, module.weight, bias=module.bias),
            F.linear(input=inputs, weight=module.weight, bias=module.bias),
            F.layer_norm(input=inputs, normalized_shape=(24,), weight=module.weight[0]),
        ]
    with Float32Arithmetic(torch.bfloat16):
        rounded = F.linear(input=inputs, weight=module.weight, bias=module.bias)
    assert torch.equal(rounded, module(inputs.bfloat16()).float())
    exact = F.linear(inputs, module.weight.float(), module.bias.float())
    assert all(torch.equal(output, exact) for output in outputs[:3])
    assert torch.equal(outputs[3], F.layer_norm(inputs, (24,), module.weight[0].float()))


def test_gradients_reach_the_stored_weights():
    module, inputs = make_module("linear", torch.bfloat16), normal(5, 24).requires_grad_()
    with Float32Arithmetic():
        module(inputs).square().sum().backward()
    assert module.weight.grad.dtype == torch.bfloat16
    exact, theirs = make_module("linear", torch.bfloat16).float(), inputs.detach().requires_grad_()
    exact(theirs).square().sum().backward()
    assert torch.equal(inputs.grad, theirs.grad)
    assert torch.equal(module.weight.grad, exact.weight.grad.bfloat16())


def test_weights_of_a_class_of_their_own_are_left_alone(monkeypatch):
    seen = []

    def of_subclass(cls, func, types, args=(), kwargs=None):
        seen.append(args[1])
        return "their own arithmetic"

    monkeypatch.setattr(Subclass, "__torch_function__", classmethod(of_subclass))
    weight = normal(40, 24, dtype=torch.bfloat16).as_subclass(Subclass)
    with Float32Arithmetic():
        output = F.linear(normal(5, 24), weight)
    assert output == "their own arithmetic"
    assert seen[0] is weight


def test_memory_stays_that_of_the_stored_weights():
    module = torch.nn.Sequential(*(make_module(kind, torch.bfloat16) for kind in ("layer_norm", "linear")))
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    with Float32Arithmetic(), torch.no_grad():
        module(normal(5, 24))
    assert module.state_dict().keys() == before.keys()
    for name, tensor in module.state_dict().items():
        pointer, stored = before[name]
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, stored)


def test_ends_with_its_block():
    module = make_module("linear", torch.bfloat16)
    with Float32Arithmetic():
        module(normal(5, 24))
    with pytest.raises(RuntimeError, match="dtype"):
        module(normal(5, 24))


def test_leaves_other_functions_alone():
    with Float32Arithmetic():
        output = torch.zeros(2, dtype=torch.bfloat16) * torch.ones(2, dtype=torch.bfloat16)
        assert output.dtype == torch.bfloat16
        assert F.embedding(torch.tensor([1]), normal(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


AMD = {"avx512_bf16": True, "cpu_name": "AMD EPYC 9B14"}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize(
    ("units", "device", "dtype", "expected"),
    [
        ({"amx_bf16": True}, CPU, BF16, (BF16, BF16)),
        ({"bf16": True}, CPU, BF16, (BF16, BF16)),
        (AMD, CPU, BF16, (F32, BF16)),
        (AMD, CPU, F16, (F32, F32)),
        (AMD, CPU, F32, (F32, F32)),
        (AMD, CUDA, BF16, (BF16, BF16)),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC 7B13"}, CPU, BF16, (F32, F32)),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, CPU, BF16, (F32, F32)),
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, CPU, BF16, (BF16, BF16)),
        ({"avx512_bf16": True}, CPU, BF16, (F32, F32)),
        ({}, CPU, BF16, (F32, F32)),
        ({}, CPU, F16, (F32, F32)),
        ({}, CPU, F32, (F32, F32)),
        ({}, CPU, F64, (F64, F64)),
        ({}, CUDA, BF16, (BF16, BF16)),
    ],
)
def test_arithmetic_is_that_of_the_processor(capabilities, units, device, dtype, expected):
    capabilities(**units)
    assert fastest_dtypes(device, dtype) == expected


def test_asks_the_processor_once(capabilities):
    capabilities(amx_bf16=True)
    assert fastest_dtypes(CPU, BF16).products == BF16
    capabilities()
    assert fastest_dtypes(CPU, BF16).products == BF16


@pytest.fixture
def int8_layers():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)

    def make(dtype=torch.float32, config=None):
        layers = nn.ModuleList([nn.Linear(48, 32, bias=bias, dtype=dtype) for bias in (False, True)])
        torchao.quantize_(layers, config or torchao.Int8DynamicActivationInt8WeightConfig())
        return layers

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 48), (1, 7, 48), (2, 3, 5, 48)])
def test_int8_arithmetic_is_that_of_torchao(int8_layers, dtype, shape):
    layers, states = int8_layers(dtype), torch.randn(shape, dtype=dtype)
    states[..., 0, :] = 0
    expected = [layer(states) for layer in layers]
    with torch.inference_mode(), Int8Arithmetic():
        outputs = [layer(states) for layer in layers]
    for output, torchao_output in zip(outputs, expected, strict=True):
        assert (output.shape, output.dtype) == (torchao_output.shape, torchao_output.dtype)
        # In bfloat16 torchao rounds between the two scales.
        torch.testing.assert_close(output, torchao_output, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_int8_states_are_quantized_once(int8_layers, monkeypatch):
    layers, states, calls = int8_layers(), torch.randn(7, 48), []
    quantize = mixed_precision_querit._quantize_rows
    monkeypatch.setattr(mixed_precision_querit, "_quantize_rows", lambda rows: calls.append(1) or quantize(rows))
    with torch.inference_mode(), Int8Arithmetic():
        for layer in layers:
            layer(states)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda states: states.mul_(2),
        lambda states: states.__imul__(2),
        lambda states: states.__setitem__(0, 3.0),
        lambda states: torch.mul(states, 2, out=states),
        lambda states: states[1].add_(1),
    ],
)
def test_int8_states_that_change_in_place_are_quantized_again(int8_layers, change):
    layer, states = int8_layers()[0], torch.randn(7, 48)
    with torch.inference_mode(), Int8Arithmetic():
        layer(states)
        change(states)
        output = layer(states)
    torch.testing.assert_close(output, layer(states))


def test_other_int8_configurations_are_left_to_torchao(int8_layers, monkeypatch):
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(mixed_precision_querit, "_quantize_rows", lambda rows: pytest.fail("not ours"))
    states = torch.randn(7, 48)
    for config in (
        torchao.Int8WeightOnlyConfig(),
        torchao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=torchao.MappingType.ASYMMETRIC),
        torchao.Int8DynamicActivationInt8WeightConfig(granularity=torchao.PerTensor()),
    ):
        layer = int8_layers(config=config)[0]
        expected = layer(states)
        with torch.inference_mode(), Int8Arithmetic():
            assert torch.equal(layer(states), expected)
