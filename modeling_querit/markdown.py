"""Texts of users in Markdown: escaped, so that ids, names and documents are shown as they are."""

from __future__ import annotations

import re

from .console import printable

# What Markdown, HTML and the formulas of the Hub would act on.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|^[#>+-]|(?<![^\W_])_|_(?![^\W_])")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def escape(text: object) -> str:
    """Escape a text for a line or a table cell: white space is collapsed, control characters become visible.

    Example:
        ```python
        >>> escape("<b>a|b</b>")
        '&lt;b&gt;a\\\\|b&lt;/b&gt;'
        ```
    """
    line = printable(" ".join(str(text).split()))
    return _MARKUP.sub(r"\\\g<0>", line).translate(_HTML)


def code(text: object) -> str:
    """A text as inline code, fenced by more backticks than it holds.

    Example:
        ```python
        >>> code("me/reranker")
        '`me/reranker`'
        ```
    """
    line = printable(" ".join(str(text).split()))
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"
