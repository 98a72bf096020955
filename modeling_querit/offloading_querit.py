"""Models whose weights accelerate loads module by module while they compute: `device_map`, `accelerate.cpu_offload`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class _Turns:
    """The lock that offloaded models are computed under: their weights come and go with each forward pass."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            # A lock that another thread holds at a fork would never be released in the child.
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.lock = threading.RLock()


_turns = _Turns()


def execution_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model computes on, which takes its inputs; offloaded weights are on another one."""
    embeddings = model.get_input_embeddings()
    for module in embeddings.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    weight = next(embeddings.parameters(), None)
    return model.device if weight is None else weight.device


def forward_lock(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context manager for forward passes: a lock if weights are offloaded, else one that does nothing."""
    is_offloaded = any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))
    return _turns.lock if is_offloaded else nullcontext()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks of a module, which may be several in one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", [hook])
