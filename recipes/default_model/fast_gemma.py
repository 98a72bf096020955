"""Bidirectional Gemma 3 with adapters on unpadded texts, for training on a single CPU core.

It computes the same states as transformers' `Gemma3TextModel` with `use_bidirectional_attention`, from which it takes
the weights. It is fast on a CPU because nothing is padded, adapters are merged before each step (so that the forward
pass has no small matrix products), attention runs text by text, and all elementwise operations are compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .package import fastest_dtypes

# Dtype of matrix products: bfloat16 where the processor multiplies it faster than float32.
DTYPE = fastest_dtypes(torch.device("cpu"), torch.bfloat16).products
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class Adapter(nn.Module):
    """A frozen linear layer with a low-rank update, `W + scale * B A`.

    Args:
        weight: Weight of the linear layer, (out, in); kept in float32, as bfloat16 would round small updates away.
        rank: Rank of the update.
        scale: Factor of the update, `alpha / rank`.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.weight, self.scale = weight.detach().float(), scale
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Refresh the copies in `DTYPE` after an optimizer step."""
        self.merged = self.changed().to(DTYPE)
        self.a_low, self.b_low = self.a.to(DTYPE), self.b.to(DTYPE)

    @torch.no_grad()
    def changed(self) -> Tensor:
        """The weight with its update, float32."""
        return torch.addmm(self.weight, self.b, self.a, alpha=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out), `DTYPE`."""
        return _Adapted.apply(x, self.a, self.b, self.merged, self.a_low, self.b_low, self.scale)


class Whole(nn.Module):
    """A linear layer whose full weight is trained, in float32; its products are in `DTYPE`.

    Args:
        weight: Initial weight, (out, in).
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.w = nn.Parameter(weight.detach().float().clone())
        self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Refresh the copies in `DTYPE` after an optimizer step."""
        self.merged = self.w.to(DTYPE)

    def changed(self) -> Tensor:
        """The weight, float32."""
        return self.w.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out), `DTYPE`."""
        return _Multiplied.apply(x, self.w, self.merged)


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, merged: Tensor):
        ctx.save_for_backward(x, merged)
        return functional.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        x, merged = ctx.saved_tensors
        return gradient @ merged if ctx.needs_input_grad[0] else None, (gradient.t() @ x).float(), None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, merged: Tensor, a_low: Tensor, b_low: Tensor, scale: float):
        ctx.save_for_backward(x, merged, a_low, b_low)
        ctx.scale = scale
        return functional.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        x, merged, a_low, b_low = ctx.saved_tensors
        below = gradient @ merged if ctx.needs_input_grad[0] else None
        gradient_b = gradient.t() @ functional.linear(x, a_low)
        gradient_a = (gradient @ b_low).t() @ x
        return below, ctx.scale * gradient_a.float(), ctx.scale * gradient_b.float(), None, None, None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)).to(DTYPE)


def _add_norm(h: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return h + _norm(x, weight, eps)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return (functional.gelu(gate.float(), approximate="tanh") * up.float()).to(DTYPE)


def _norm_turn(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float) -> Tensor:
    """RMSNorm and rotary embedding of (tokens, heads, dim)."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)
    first, second = y.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return (rotated * scale).to(DTYPE)


class _Attend(torch.autograd.Function):
    """softmax(q k^T) v text by text; q is (tokens, heads, dim), k and v are (tokens, dim), shared by all heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int):
        out, shares, start = torch.empty_like(q), [], 0
        heads, dim = q.shape[1:]
        for length in lengths:
            here = slice(start, start + length)
            scores = (q[here].reshape(-1, dim) @ k[here].t()).float()
            if window and length > window:
                positions = torch.arange(length)
                far = (positions[:, None] - positions[None, :]).abs() >= window
                scores.masked_fill_(far.repeat_interleave(heads, 0), float("-inf"))
            share = scores.softmax(-1).to(q.dtype)
            out[here] = (share @ v[here]).view(length, heads, dim)
            shares.append(share)
            start += length
        ctx.save_for_backward(q, k, v, *shares)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        q, k, v, *shares = ctx.saved_tensors
        to_q, to_k, to_v, start = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), 0
        heads, dim = q.shape[1:]
        for length, share in zip(ctx.lengths, shares, strict=True):
            here = slice(start, start + length)
            above = gradient[here].reshape(-1, dim)
            to_v[here] = share.t() @ above
            to_share = above @ v[here].t()
            to_scores = torch._softmax_backward_data(to_share.float(), share.float(), -1, torch.float32).to(q.dtype)
            to_q[here] = (to_scores @ k[here]).view(length, heads, dim)
            to_k[here] = to_scores.t() @ q[here].reshape(-1, dim)
            start += length
        return to_q, to_k, to_v, None, None


class FastGemma(nn.Module):
    """The backbone with adapters on all its linear layers.

    Args:
        backbone: A `Gemma3TextModel` that attends in both directions, with one head of keys and values.
        rank: Rank of the adapters; 0 trains the full weights of the linear layers.
        alpha: Numerator of the adapters' scale, `alpha / rank`.
        compiled: Flag that compiles the elementwise operations between matrix products.
    """

    def __init__(self, backbone: nn.Module, rank: int = 32, alpha: float = 32.0, compiled: bool = True):
        super().__init__()
        config = backbone.config
        if not config.use_bidirectional_attention or config.num_key_value_heads != 1:
            raise ValueError("FastGemma attends in both directions with one head of keys and values.")
        self.config = config
        self.embeddings = backbone.embed_tokens.weight.detach().to(DTYPE)
        self.layers = nn.ModuleList()
        for layer in backbone.layers:
            weights = {part: layer.get_submodule(part).weight for part in PARTS}
            parts = {
                part: Adapter(weight, rank, alpha / rank) if rank else Whole(weight) for part, weight in weights.items()
            }
            self.layers.append(nn.ModuleDict({part.split(".")[1]: linear for part, linear in parts.items()}))
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self._norms = [
            [getattr(layer, f"{norm}_layernorm").weight.detach().float() for norm in norms]
            + [layer.self_attn.q_norm.weight.detach().float(), layer.self_attn.k_norm.weight.detach().float()]
            for layer in backbone.layers
        ]
        self._last_norm = backbone.norm.weight.detach().float()
        compile_ = (lambda function: torch.compile(function, dynamic=True)) if compiled else (lambda function: function)
        self._norm, self._add_norm, self._gated = compile_(_norm), compile_(_add_norm), compile_(_gated)
        # Compiled separately, as queries and keys differ in shape.
        self._turn_q, self._turn_k = compile_(_norm_turn), compile_(lambda *arguments: _norm_turn(*arguments))
        self._tables = {
            kind: _rotations(config.rope_parameters[kind]["rope_theta"], config.head_dim)
            for kind in set(config.layer_types)
        }

    def merge(self) -> None:
        """Refresh the copies in `DTYPE` of all linear layers; call it after every optimizer step."""
        for layer in self.layers:
            for linear in layer.values():
                linear.merge()

    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of texts -> final hidden states of their last tokens, (texts, hidden), float32."""
        last = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
        return self.normalize(self.states(texts)[last])

    def normalize(self, states: Tensor) -> Tensor:
        """The final RMSNorm, float32."""
        y = states.float()
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * (1.0 + self._last_norm)

    def states(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of texts -> states of all their tokens before the final norm, (tokens, hidden), `DTYPE`."""
        lengths = [len(text) for text in texts]
        ids = torch.tensor([token for text in texts for token in text])
        positions = torch.cat([torch.arange(length) for length in lengths])
        tables = {kind: tuple(part[positions][:, None] for part in table) for kind, table in self._tables.items()}
        eps, dim = self.config.rms_norm_eps, self.config.head_dim
        h = functional.embedding(ids, self.embeddings) * torch.tensor(self.config.hidden_size**0.5).to(DTYPE)
        for layer, norms, kind in zip(self.layers, self._norms, self.config.layer_types, strict=True):
            cos, sin = tables[kind]
            x = self._norm(h, norms[0], eps)
            q = layer["q_proj"](x).view(len(ids), -1, dim)
            k = layer["k_proj"](x).view(len(ids), 1, dim)
            q = self._turn_q(q, norms[4], cos, sin, eps, self.config.query_pre_attn_scalar**-0.5)
            k = self._turn_k(k, norms[5], cos, sin, eps, 1.0)
            window = self.config.sliding_window if kind == "sliding_attention" else 0
            x = _Attend.apply(q, k.view(-1, dim), layer["v_proj"](x), lengths, window)
            h = self._add_norm(h, layer["o_proj"](x.view(len(ids), -1)), norms[1], eps)
            x = self._norm(h, norms[2], eps)
            x = self._gated(layer["gate_proj"](x), layer["up_proj"](x))
            h = self._add_norm(h, layer["down_proj"](x), norms[3], eps)
        return h

    @torch.no_grad()
    def write_to(self, backbone: nn.Module) -> None:
        """Copy the updated weights into a `Gemma3TextModel` of the same shape."""
        for layer, trained in zip(backbone.layers, self.layers, strict=True):
            for part in PARTS:
                linear = trained[part.split(".")[1]]
                target = layer.get_submodule(part).weight
                target.copy_(linear.changed().to(target.dtype))


def _rotations(theta: float, dim: int, count: int = 2048) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, (positions, dim / 2)."""
    angles = torch.arange(count).float()[:, None] / theta ** (torch.arange(0, dim, 2).float() / dim)
    # Rounded to bfloat16, as transformers does.
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()
