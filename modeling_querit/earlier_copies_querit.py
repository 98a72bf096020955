"""Models from folders saved by earlier versions of this code, ranking in the same process.

Each saved folder has its own copy of the code. Copies from earlier versions all register their attention function under
one name, `querit_packed`, in transformers' global table, so the last copy to be loaded would replace the functions of
the others. `make_room_for_earlier_copies` puts a dispatcher in their place, which finds the copy whose forward pass is
running, by the context variable that this copy sets meanwhile, and calls its function.
"""

from __future__ import annotations

import os
import sys
from contextvars import copy_context
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ATTENTION = "querit_packed"
_RUN_VARIABLE = "querit_run"


def make_room_for_earlier_copies() -> None:
    """Install the dispatcher, for any number of earlier copies, also those that are loaded later."""
    # An entry of its own, which comes before what others register.
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attend
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_release_locks)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as the copy does whose forward pass this is; outside of one, by plain SDPA, as all of them do."""
    attend = sdpa_attention_forward
    for variable, run in copy_context().items():
        if variable.name == _RUN_VARIABLE and run is not None:
            attend = type(run).__init__.__globals__["packed_attention"]
    return attend(module, query, key, value, attention_mask, **kwargs)


def _release_locks() -> None:
    """Drop the locks of all copies: one that another thread holds at a fork would never be released in the child."""
    for name, module in list(sys.modules.items()):
        if name.endswith(".engine_querit"):
            getattr(module, "_LOCKS", {}).clear()
