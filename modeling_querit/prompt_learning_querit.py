"""Models inside peft's: an adapter of weights is part of every forward pass, a learned prompt is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class without_prompts:
    """Decorator of methods that would leave a learned prompt out: prompt tuning, prefix tuning, p-tuning.

    peft puts the prompt before the inputs in its own `forward`, and hands on all other attributes of the model that it
    wraps. So its `rank` would be that of the model without the prompt, which is refused.

    Args:
        method: The method.
    """

    def __init__(self, method: Callable[..., Any]):
        self.method = method

    def __get__(self, model: Any, owner: type | None = None) -> Callable[..., Any]:
        # The model does not know what wraps it: only the caller that asks for the attribute on its behalf does.
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if model is not None and caller is not None and caller.f_code.co_name == "__getattr__":
            check_no_prompt(caller.f_locals.get("self"), self.method.__name__)
        return self.method.__get__(model, owner)


def check_no_prompt(model: Any, name: str) -> None:
    """Check that a model, perhaps a peft model, has no learned prompt that is switched on.

    Args:
        model: The model.
        name: Method that was called on it, for the error message.

    Raises:
        NotImplementedError: if it has one.
    """
    config: Any = getattr(model, "active_peft_config", None) if hasattr(type(model), "active_peft_config") else None
    if config is not None and config.is_prompt_learning and model.has_active_enabled_adapter:
        raise NotImplementedError(
            f"{name} would leave out the learned prompt of this {config.peft_type.value} adapter, and give the scores "
            "of the model without it: use an adapter of weights, such as LoRA, or `get_base_model()` for those scores."
        )
