"""Files of settings, in YAML or JSON: the one reader of `querit train`, `adapt` and `merge --recipe`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from .files import parse_json, read_text

_YAML = (".yaml", ".yml")
# Settings that are texts for a model, which may be empty.
_TEXTS = ("instruction",)
# Larger files are data. PyYAML reads about 100 kB a second.
_MAX_CHARS = 1 << 20
# Values of a file with every alias written out: an alias of an alias of an alias doubles them each time.
_MAX_VALUES = 100_000
# What PyYAML's constructors raise for a value that is not of its tag, such as `2024-99-99` or `!!bool maybe`.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a mapping of settings from a file: YAML if its name ends in `.yaml` or `.yml`, else JSON.

    `1e-5` is a number, as in YAML 1.2. Aliases are allowed as long as they do not refer to themselves or multiply.

    Raises:
        OSError: if there is no such file, or it is a folder or a device.
        ValueError: if it is not in that format, not a mapping, or names a setting twice; the message names the line.
    """
    text = read_text(path)
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{path} is larger than {_MAX_CHARS >> 20} MB: that is no file of settings.")
    is_yaml = str(path).endswith(_YAML)
    settings = _parse_yaml(text, str(path)) if is_yaml else parse_json(text.encode("utf-8"), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a mapping of settings, such as 'model: mini'.")
    _check_not_empty(settings, str(path), prefix="")
    if unnamed := [name for name in settings if not isinstance(name, str)]:
        raise ValueError(f"{path}: {unnamed[0]!r} is not the name of a setting: write it in quotes, or remove it.")
    return settings


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, as YAML 1.2 does; for PyYAML, which follows YAML 1.1, it is text without a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, {}, name)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{line}: {error.problem or error.context}.") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply.") from None
    except _Refused:
        raise
    except _YAML_ERRORS as error:
        raise ValueError(f"{name} has a value that YAML cannot read: {error}.") from None


class _Refused(ValueError):
    """A file that is YAML, and no settings."""


def _check_node(node: yaml.Node, sizes: dict[int, int | None], name: str) -> int:
    """Count the values of a node with every alias written out, before any of them is constructed.

    Args:
        node: Node of the composed document; aliases are edges to the node they name.
        sizes: Counts of the nodes seen so far by their identity; None while a node is being counted.
        name: Name of the file, for error messages.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _Refused(f"{name}, line {node.start_mark.line + 1}: an alias refers to itself: remove it.")
        return size
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_names(node, name)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_check_node(child, sizes, name) for child in children)
    if size > _MAX_VALUES:
        raise _Refused(f"{name} holds more than {_MAX_VALUES:,} values: that is no file of settings.")
    sizes[id(node)] = size
    return size


def _check_names(node: yaml.MappingNode, name: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in lines:
                line = key.start_mark.line + 1
                raise _Refused(f"{name}, line {line}: {key.value} stands in line {lines[key.value]} already: keep one.")
            lines[key.value] = key.start_mark.line + 1


def _check_not_empty(settings: Mapping[Any, Any], where: str, prefix: str) -> None:
    """Refuse empty texts, which a program would take for the working folder or for a default."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_not_empty(value, where, f"{prefix}{name}.")
            continue
        values = value if isinstance(value, list) else [value]
        if name not in _TEXTS and any(isinstance(item, str) and not item.strip() for item in values):
            raise ValueError(f"{where}: {prefix}{name} is empty: give a value, or leave it out.")
