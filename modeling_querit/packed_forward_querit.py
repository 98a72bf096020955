"""The forward pass of one pack through a backbone, with the last layer computed only at scored positions."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .packed_attention_querit import (
    PLACEHOLDER_MASK_SHAPE,
    KeyValueStates,
    PackedForward,
    PackingError,
    accept_packed_forward,
)
from .packing_querit import Pack, plan_packs

if TYPE_CHECKING:
    from .modeling_querit import QueritForSequenceRanking

# Parts of a decoder layer that compute each token for itself, by the names that transformers gives them. The
# projections of keys and values are not among them: the last layer needs those of all tokens.
_PER_TOKEN_PARTS = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp",
    "post_feedforward_layernorm",
)
# The packed forward pass active in this thread. The hooks check it so that ordinary calls to the same modules are left
# alone.
_PRUNED_FORWARD: ContextVar[PackedForward | None] = ContextVar("querit_pruned_forward", default=None)
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    # A lock that another thread holds at a fork would never be released in the child.
    os.register_at_fork(after_in_child=_LOCKS.clear)


def exclusive(backbone: nn.Module) -> threading.RLock:
    """Return the lock of a backbone: packed forward passes and rankings change its hooks and its training mode."""
    return _LOCKS.setdefault(backbone, threading.RLock())


def run_packed(
    backbone: PreTrainedModel,
    run_backbone: Callable[..., BaseModelOutputWithPast],
    pack: Pack,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    carried: KeyValueStates | None = None,
    prune_last_layer: bool = True,
) -> tuple[Tensor, KeyValueStates]:
    """Run a backbone on a pack; differentiable.

    Args:
        backbone: The backbone, as transformers has it.
        run_backbone: Function that calls the backbone with its keyword arguments.
        pack: The pack.
        input_ids: Token ids of the pack, (1, tokens).
        position_ids: Position of each token within its pair, (1, tokens).
        carried: Prefix KV cache returned by the call for the previous pack; required if `pack.carried_length` > 0.
        prune_last_layer: Whether the last layer computes only keys and values at positions that are not scored.

    Returns:
        Final hidden states at the scored positions, (pairs, hidden), in the order of `pack.pairs`; and the prefix KV
        cache for the next pack (`pack.carry_over`).

    Raises:
        PackingError: if packs cannot express the backbone's attention.
        ValueError: if pairs of the pack share a prefix, but the backbone attends in both directions; or if the pack
            continues the previous one, but `carried` is missing.
    """
    if not supports_packing(backbone):
        raise PackingError("layers other than plain attention")
    if pack.carried_length and not carried:
        raise ValueError("This pack continues the previous one: pass `carried=output.carried` from that call.")
    if pack.has_shared_prefix and not is_causal(backbone):
        raise ValueError(
            "The pack has a shared prefix, but the backbone attends in both directions, so the states of a prefix "
            "depend on what follows it: plan the packs with share_prefix=False."
        )
    implementation = backbone.config._attn_implementation
    accept_packed_forward(implementation)
    prunes = prune_last_layer and not _recomputes_last_layer(backbone)
    pruned_layer = backbone.config.num_hidden_layers - 1 if prunes else None
    packed_forward = PackedForward(pack, carried or {}, implementation, pruned_layer, is_causal(backbone))
    with exclusive(backbone), _pruned_last_layer(backbone, packed_forward):
        try:
            outputs = run_backbone(
                input_ids=input_ids,
                attention_mask=torch.empty(PLACEHOLDER_MASK_SHAPE, device=input_ids.device),
                position_ids=position_ids,
                packed_forward=packed_forward,
            )
        except (TypeError, NotImplementedError) as error:
            if "packed_forward" not in str(error):
                raise
            raise PackingError("layers that do not hand keyword arguments to their attention") from error
    packed_forward.finish(backbone.config.num_hidden_layers)
    hidden_states: Tensor = outputs[0][0]  # (tokens, hidden), or (pairs, hidden) if pruned
    if len(hidden_states) != len(pack.pairs):
        hidden_states = hidden_states[packed_forward.scored_positions(hidden_states.device)]
    return hidden_states, packed_forward.carry_over


def is_causal(backbone: PreTrainedModel) -> bool:
    """Whether tokens attend to no later ones, by the backbone's config; otherwise pairs cannot share a prefix."""
    is_causal = getattr(backbone.config, "is_causal", None)
    if is_causal is not None:
        return is_causal
    # True in Gemma 3; Gemma 4 distinguishes "all" from "vision", which leaves text causal.
    return getattr(backbone.config, "use_bidirectional_attention", None) not in (True, "all")


def supports_packing(backbone: PreTrainedModel) -> bool:
    """Whether a backbone has nothing but (sliding) attention, by transformers' interface, as far as its config says."""
    layer_types = set(getattr(backbone.config, "layer_types", None) or ["full_attention"])
    return (
        layer_types <= {"full_attention", "sliding_attention"}
        and not rope_depends_on_length(backbone)
        and getattr(backbone, "_supports_attention_backend", False)
        and not getattr(backbone, "_is_stateful", False)
    )


def rope_depends_on_length(backbone: PreTrainedModel) -> bool:
    """Whether rotary embeddings depend on the longest text of a batch: then each text is a batch by itself."""
    parameters = getattr(backbone.config, "rope_parameters", None) or {}
    # One dict for all layers, or one for each type of layer.
    candidates = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(candidate.get("rope_type") in ("dynamic", "longrope") for candidate in candidates)


def can_train_packed(model: QueritForSequenceRanking) -> bool:
    """Whether a model can be trained on packs; tried out with two tokens."""
    # Dropout is only asked for in training mode, which the model need not be in yet.
    if getattr(model.model.config, "attention_dropout", 0.0):
        return False
    pack = next(plan_packs([[0, 0]], [[0]], batch_tokens=2))
    try:
        with torch.no_grad():
            model(pack=pack, prune_last_layer=False)
    except PackingError:
        return False
    return True


def _recomputes_last_layer(backbone: PreTrainedModel) -> bool:
    """Whether gradient checkpointing recomputes the last layer, which then has to compute all positions again."""
    layers = getattr(backbone, "layers", None)
    return bool(backbone.training and layers and getattr(layers[-1], "gradient_checkpointing", False))


@contextmanager
def _pruned_last_layer(backbone: PreTrainedModel, packed_forward: PackedForward) -> Iterator[None]:
    """Cut the inputs of the last layer's per-token parts, and its output, down to the scored positions."""
    layers = getattr(backbone, "layers", None)
    if packed_forward.pruned_layer is None or not layers:
        yield
        return
    parts = dict(layers[-1].named_modules())
    hooks = _PruningHooks(packed_forward)
    handles = []
    token = _PRUNED_FORWARD.set(packed_forward)
    try:
        for part in filter(None, map(parts.get, _PER_TOKEN_PARTS)):
            handles.append(part.register_forward_pre_hook(hooks.select_input))
            handles.append(part.register_forward_hook(hooks.restore_positions))
        handles.append(layers[-1].register_forward_hook(hooks.select_output))
        yield
    finally:
        _PRUNED_FORWARD.reset(token)
        for handle in handles:
            handle.remove()


class _PruningHooks:
    """Forward hooks that act only within one packed forward pass."""

    def __init__(self, packed_forward: PackedForward):
        self.packed_forward = packed_forward

    def select_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """(1, tokens, ...) -> (1, pairs, ...) for the first argument of a per-token part."""
        if not self._is_active():
            return None
        states, *others = args
        return states[:, self._positions(states)], *others

    def restore_positions(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """(1, pairs, ...) -> (1, tokens, ...) for its output, zero at positions that are not scored."""
        if not self._is_active():
            return None
        restored = output.new_zeros(1, len(self.packed_forward.pack), *output.shape[2:])
        restored[:, self._positions(output)] = output
        return restored

    def select_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """(1, tokens, hidden) -> (1, pairs, hidden) for the output of the layer; some return more than states."""
        if not self._is_active() or not isinstance(output, Tensor):
            return None
        return output[:, self._positions(output)]

    def _is_active(self) -> bool:
        return _PRUNED_FORWARD.get() is self.packed_forward

    def _positions(self, states: Tensor) -> Tensor:
        return self.packed_forward.scored_positions(states.device)
