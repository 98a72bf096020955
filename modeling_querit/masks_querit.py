"""Attention masks as callers give them, and what they say about which positions are tokens."""

from __future__ import annotations

import torch


def prepare_mask(
    attention_mask: torch.Tensor | None, batch_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask for the backbone, and (batch, sequence) booleans that tell tokens from padding (None: all tokens)."""
    if attention_mask is None:
        return None, None
    if attention_mask.dim() == 2:
        return attention_mask, attention_mask.bool()
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give (batch, sequence) or "
            "(batch, 1, sequence, sequence)."
        )
    if not attention_mask.is_floating_point():
        attention_mask = attention_mask.bool()
    is_boolean = attention_mask.dtype == torch.bool
    # Blocked is written as the dtype's minimum, as -inf, -1e9 or -1e4; what is above is a bias.
    may_attend = attention_mask if is_boolean else attention_mask > -1e3
    is_biased = not is_boolean and bool((attention_mask[may_attend] != 0).any())
    may_attend = may_attend.expand(batch_size, -1, -1, -1)
    is_token = _linked_positions(may_attend[:, 0])
    causal = torch.ones_like(may_attend[0, 0]).tril()
    plain = is_token[:, :, None] & is_token[:, None, :] & causal
    # Causal attention over the tokens, as the reference wrapper writes it, is what a 2-D mask says: with that the
    # backbone builds its own masks (sliding windows too) and its fastest kernels stay available.
    if not is_biased and torch.equal(may_attend[:, 0] & is_token[:, :, None], plain):
        return is_token.long(), is_token
    if is_boolean:
        blocked = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        attention_mask = blocked.masked_fill(~attention_mask, torch.finfo(dtype).min)
    return attention_mask, is_token


def _linked_positions(may_attend: torch.Tensor) -> torch.Tensor:
    """(batch, sequence): positions that see themselves and that see, or are seen by, another one.

    Padding sometimes sees itself, lest its row of the softmax be empty; nothing else has to do with it.
    """
    itself = may_attend.diagonal(dim1=-2, dim2=-1)
    others = may_attend & ~torch.eye(may_attend.shape[-1], dtype=torch.bool, device=may_attend.device)
    linked = itself & (others.any(-1) | others.any(-2))
    # A text of one token is linked to nothing.
    return torch.where(linked.any(-1, keepdim=True), linked, itself)


def last_token(hidden_states: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """(batch, hidden): the state at the last token of each row, whichever side the padding is on."""
    if is_token is None:
        return hidden_states[:, -1]
    positions = torch.arange(is_token.shape[1], device=is_token.device)
    last = torch.where(is_token, positions, 0).argmax(-1).to(hidden_states.device)
    return hidden_states[torch.arange(len(last), device=hidden_states.device), last]
