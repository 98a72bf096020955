"""Checks of arguments that users give."""

from __future__ import annotations

import operator
from typing import Any


def check_count(name: str, value: Any) -> int | None:
    """Check an optional number that a user gives.

    Args:
        name: Name of the argument.
        value: Integer of at least 1, of Python, numpy or torch; or None.

    Returns:
        The same as an int, or None.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1.
    """
    if value is None:
        return None
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} is {describe(value)}: give an integer of at least 1.")
    if count < 1:
        raise ValueError(f"{name} is {count}: give an integer of at least 1.")
    return count


def describe(value: Any) -> str:
    """Type and beginning of a value that a user gave, for error messages."""
    # Arrays and data frames have several lines.
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
