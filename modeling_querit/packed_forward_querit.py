"""The forward pass of one pack through a backbone, with the last layer computed only at scored positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
from .shallow_copies_querit import copy_submodules

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
        run_backbone: Function that calls a backbone, its first argument, with keyword arguments.
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
    try:
        outputs = run_backbone(
            _prune_last_layer(backbone, packed_forward),
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


def _prune_last_layer(backbone: PreTrainedModel, packed_forward: PackedForward) -> PreTrainedModel:
    """Return a copy in which the last layer's per-token parts, and its output, are those of the scored positions."""
    layers = dict(backbone.named_children()).get("layers")
    if packed_forward.pruned_layer is None or not isinstance(layers, nn.ModuleList):
        return backbone
    names = dict(layers[-1].named_modules())
    paths = [name for name in _PER_TOKEN_PARTS if name in names]
    last = f"layers.{len(layers) - 1}"
    copied, [layer, *parts] = copy_submodules(backbone, [last, *(f"{last}.{path}" for path in paths)])

    def positions(states: Tensor) -> Tensor:
        return packed_forward.scored_positions(states.device)

    def select_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(1, tokens, ...) -> (1, pairs, ...) for the first argument of a per-token part."""
        states, *others = args
        return states[:, positions(states)], *others

    def restore_positions(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(1, pairs, ...) -> (1, tokens, ...) for its output, zero at positions that are not scored."""
        restored = output.new_zeros(1, len(packed_forward.pack), *output.shape[2:])
        restored[:, positions(output)] = output
        return restored

    def select_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """(1, tokens, hidden) -> (1, pairs, hidden) for the output of the layer; some return more than states."""
        return output[:, positions(output)] if isinstance(output, Tensor) else None

    for part in parts:
        part.register_forward_pre_hook(select_input)
        part.register_forward_hook(restore_positions)
    layer.register_forward_hook(select_output)
    return copied
