"""Shallow copies of modules: the same weights, in modules whose mode, hooks and submodules are their own.

Ranking evaluates models that may be in training, and prunes their last layer. Other threads use, copy or save the same
model meanwhile, and a KeyboardInterrupt may come between any two instructions. So nothing of a model is changed: what
has to differ is a copy, which is dropped afterwards, and there is nothing to lock or to put back.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def evaluation_copy(model: ModuleType) -> ModuleType:
    """Return the model itself if all its modules are in evaluation mode, else a copy in evaluation mode.

    Args:
        model: Any model; it is not changed.

    Raises:
        ValueError: if a module in training mode has a replaced `forward`, which would compute in that mode.
    """
    if not any(module.training for module in model.modules()):
        return model
    return _in_evaluation(model, {})


def _in_evaluation(module: ModuleType, copies: dict[nn.Module, nn.Module]) -> ModuleType:
    if module not in copies:
        copied = copies[module] = _shallow_copy(module)
        if module.training and "forward" in vars(module) and vars(copied)["forward"] is vars(module)["forward"]:
            raise ValueError(
                f"The forward function of a {type(module).__name__} was replaced, and the model is in training mode: "
                "call model.eval() before ranking."
            )
        copied.training = False
        for name, child in module._modules.items():
            copied.add_module(name, None if child is None else _in_evaluation(child, copies))
    return copies[module]  # type: ignore[return-value]


def copy_submodules(module: ModuleType, paths: Iterable[str]) -> tuple[ModuleType, list[nn.Module]]:
    """Copy a module and those of its submodules that are on the way to some of them.

    Args:
        module: Module, which is not changed.
        paths: Names of submodules, as `named_modules` gives them.

    Returns:
        The copy, and the copies of the submodules in the order of `paths`.
    """
    copies: dict[str, nn.Module] = {"": _shallow_copy(module)}
    for path in paths:
        parent = ""
        for name in path.split("."):
            child = f"{parent}.{name}" if parent else name
            if child not in copies:
                copies[child] = _shallow_copy(getattr(copies[parent], name))
                copies[parent].add_module(name, copies[child])
            parent = child
    return copies[""], [copies[path] for path in paths]  # type: ignore[return-value]


def _shallow_copy(module: ModuleType) -> ModuleType:
    copied = object.__new__(type(module))
    for name, value in dict(vars(module)).items():
        # Submodules, buffers and hooks are held in dicts. That of the parameters stays the same one: FSDP and
        # accelerate exchange its content while a module computes.
        is_own = isinstance(value, dict) and name != "_parameters"
        vars(copied)[name] = value.copy() if is_own else _rebind(value, module, copied)
    return copied


def _rebind(value: Any, module: nn.Module, copied: nn.Module) -> Any:
    """Bind to the copy what was bound to the module itself: the functions by which accelerate replaces `forward`."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, copied)
    if isinstance(value, partial) and any(argument is module for argument in value.args):
        args = (copied if argument is module else argument for argument in value.args)
        return partial(value.func, *args, **value.keywords)
    return value
