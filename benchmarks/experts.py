"""A mixture-of-experts layer, ours against dense arithmetic and transformers' own: python -m benchmarks.experts

The layer is that of A0.4B: hidden size 1,024, 128 experts of width 512, 4 for each token, with random weights and
random routing. The dense layer is a SwiGLU of width 4 x 512: the same arithmetic for a token, without routing. On CUDA
the Triton kernels are first checked against transformers' loop in float64, forward and backward, and the training step
is timed too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3MLP

from benchmarks import timing
from benchmarks.shapes import text_config
from modeling_querit import moe_querit

# With more tokens, batched_mm copies more weights than fit in memory.
BATCHED_MM_TOKENS = 64
# Largest error by dtype, relative to the largest value of a tensor.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CHECKED_TOKENS = 512

Inputs = tuple[Tensor, Tensor, Tensor]
Function = Callable[[], Any]


def implementation(device: torch.device) -> str:
    """Return the name of our implementation on a device."""
    return moe_querit.TRITON_IMPLEMENTATION if device.type == "cuda" else moe_querit.EXPERTS_IMPLEMENTATION


def make_layer(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> DeepseekV3Experts:
    """Make experts with random weights."""
    layer = DeepseekV3Experts(config).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=config.initializer_range)
    return layer.to(device, dtype)


def make_dense(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> DeepseekV3MLP:
    """Make a dense layer with the arithmetic of the experts of one token."""
    width = config.num_experts_per_tok * config.moe_intermediate_size
    return DeepseekV3MLP(config, intermediate_size=width).eval().to(device, dtype)


def make_inputs(config: PreTrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw hidden states, and for each token distinct experts with weights that sum to 1."""
    hidden_states = torch.randn(tokens, config.hidden_size)
    scores, experts = torch.rand(tokens, config.n_routed_experts).topk(config.num_experts_per_tok)
    weights = scores / scores.sum(-1, keepdim=True)
    return hidden_states.to(device, dtype), experts.to(device), weights.to(device, dtype)


def run_layer(layer: DeepseekV3Experts, name: str, inputs: Inputs) -> Tensor:
    """Run the layer by an implementation."""
    layer.config._experts_implementation = name
    return layer(*inputs)


def flops(config: PreTrainedConfig, tokens: int) -> float:
    """Count floating-point operations of a forward pass: three products for each expert of each token."""
    return 6.0 * tokens * config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size


def contenders(
    layer: DeepseekV3Experts, dense: dict[str, nn.Module], inputs: Inputs, device: torch.device, backward: bool
) -> dict[str, Function]:
    """Return functions to time, by name: ours, the dense layers, transformers' own implementations."""
    tokens = len(inputs[0])
    names = [implementation(device), "eager", "grouped_mm"]
    if tokens <= BATCHED_MM_TOKENS and not backward:
        names.append("batched_mm")
    forward: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module, torch.dtype]] = {}
    for name in names:
        forward[name] = (lambda x, name=name: run_layer(layer, name, (x, *inputs[1:])), layer, inputs[0].dtype)
    for name, module in dense.items():
        forward[name] = module, module, next(module.parameters()).dtype
    step = _forward_backward if backward else _forward
    return {name: step(function, module, inputs[0].to(dtype)) for name, (function, module, dtype) in forward.items()}


def _forward(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Function:
    def run() -> Tensor:
        with torch.inference_mode():
            return function(x)

    return run


def _forward_backward(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Function:
    x = x.clone().requires_grad_()
    tensors, grad = [x, *module.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x), tensors, grad)


def compare(
    args: argparse.Namespace, config: PreTrainedConfig, tokens: int, backward: bool, rates: dict[str, float]
) -> list[timing.Row]:
    """Compare for a number of tokens; `rates` are GFLOP/s of large matrix products by dtype."""
    device, dtype = args.device, getattr(torch, args.dtype)
    layer, inputs = make_layer(config, dtype, device), make_inputs(config, tokens, dtype, device)
    dense: dict[str, nn.Module] = {"dense": make_dense(config, dtype, device)}
    if device.type == "cpu" and dtype != torch.float32:
        dense["dense, float32"] = make_dense(config, torch.float32, device)
    functions = contenders(layer, dense, inputs, device, backward)
    calls = 20 if device.type == "cuda" else 1
    timed = {name: timing.synchronized(function, device, calls) for name, function in functions.items()}
    seconds = timing.interleaved(timed, args.rounds)
    seconds = {name: [time_taken / calls for time_taken in times] for name, times in seconds.items()}
    return _rows(seconds, list(dense), config, tokens, backward, implementation(device), rates)


def _rows(
    seconds: dict[str, list[float]],
    dense: Sequence[str],
    config: PreTrainedConfig,
    tokens: int,
    backward: bool,
    ours: str,
    rates: dict[str, float],
) -> list[timing.Row]:
    workload = f"{tokens} tokens, forward{' and backward' if backward else ''}"
    work = flops(config, tokens) * (3 if backward else 1)
    median = timing.medians(seconds)

    def row(against: str, remarks: str = "") -> timing.Row:
        our_rate, their_rate = work / median[ours] / 1e9, work / median[against] / 1e9
        remarks = ", ".join(filter(None, [remarks, f"{our_rate:.0f} and {their_rate:.0f} GFLOP/s"]))
        rates = {"gflops_per_second_ours": our_rate, "gflops_per_second_against": their_rate}
        return timing.row(workload, ours, against, seconds, remarks=remarks, tokens=tokens, **rates)

    others = [name for name in seconds if name not in (ours, *dense)]
    best = min(others, key=lambda name: median[name])
    best_row = row(best, best) | {"against": "best of transformers", "against_name": best}
    bound = timing.bound_row(workload, ours, seconds, work, rates, tokens=tokens)
    return [*(row(name) for name in (*dense, *others)), best_row, bound]


def check(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, tokens: int) -> dict[str, float]:
    """Compute the errors of our output and gradients by tensor, relative to its largest value, against float64."""
    layer, inputs = make_layer(config, dtype, device), make_inputs(config, tokens, dtype, device)
    exact = DeepseekV3Experts(config).to(device, torch.float64)
    exact.load_state_dict(layer.state_dict())
    grad = torch.randn_like(inputs[0])
    actual = _output_and_gradients(layer, implementation(device), inputs, grad)
    expected = _output_and_gradients(exact, "eager", (inputs[0].double(), inputs[1], inputs[2].double()), grad)
    names = ("output", "hidden_states", "router weights", *(name for name, _ in layer.named_parameters()))
    return {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(names, actual, expected, strict=True)
    }


def _output_and_gradients(layer: DeepseekV3Experts, name: str, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    hidden_states, experts, weights = inputs
    x, weights = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = run_layer(layer, name, (x, experts, weights))
    return [output, *torch.autograd.grad(output, [x, weights, *layer.parameters()], grad.to(output.dtype))]


def check_all(config: PreTrainedConfig, device: torch.device, tokens: int = CHECKED_TOKENS) -> list[dict[str, Any]]:
    """Print the errors in both dtypes; `ok` says whether one is within its tolerance."""
    table = Table("dtype", "tensor", "error", "tolerance", title=f"{implementation(device)} against float64")
    results = []
    for dtype, tolerance in TOLERANCES.items():
        for name, error in check(config, dtype, device, tokens).items():
            # Written so that NaN is not ok.
            results.append({"dtype": str(dtype), "tensor": name, "error": error, "ok": error <= tolerance})
            table.add_row(str(dtype), name, f"{error:.2e}", f"{tolerance:.0e}")
    Console(width=120).print(table)
    return results


def _profile(args: argparse.Namespace, config: PreTrainedConfig) -> dict[str, float]:
    dtype, tokens = getattr(torch, args.dtype), max(args.tokens)
    layer, inputs = make_layer(config, dtype, args.device), make_inputs(config, tokens, dtype, args.device)
    functions = contenders(layer, {}, inputs, args.device, backward=False)
    shares = timing.profile_shares(functions[implementation(args.device)], args.device)
    timing.print_shares(shares, f"{implementation(args.device)}, {tokens} tokens")
    return shares


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = timing.common_parser(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048, 4096], help="tokens of a forward pass")
    parser.add_argument("--shape", choices=["a0_4b", "tiny_moe"], default="a0_4b", help="model whose layer is timed")
    backward = argparse.BooleanOptionalAction
    parser.add_argument("--backward", action=backward, help="time the training step too (default: on CUDA)")
    parser.add_argument("--check-only", action="store_true", help="check against float64 only")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or 5
    args.backward = args.device.type == "cuda" if args.backward is None else args.backward
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print a table, and write the results."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    config = text_config(args.shape)
    checks = check_all(config, args.device) if args.device.type == "cuda" or args.check_only else []
    if not all(result["ok"] for result in checks):
        sys.exit("The kernels differ from float64 by more than rounding: nothing was timed.")
    rows: list[timing.Row] = []
    more: dict[str, Any] = {"checks": checks}
    if not args.check_only:
        more["gemm_gflops_per_second"] = rates = timing.gemm_rates(args.device)
        for tokens in args.tokens:
            for backward in (False, True) if args.backward else (False,):
                rows += compare(args, config, tokens, backward, rates)
        timing.print_rows(rows, f"Experts of {args.shape}, {args.dtype}, medians of {args.rounds}")
    if args.profile and rows:
        more["profile"] = _profile(args, config)
    if args.json:
        timing.write_json(args.json, rows, timing.machine(args.seed, args.device), settings=vars(args), **more)


if __name__ == "__main__":
    main()
