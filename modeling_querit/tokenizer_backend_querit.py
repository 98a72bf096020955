"""Tokenizers of the tokenizers library: cheap copies, and the first tokens of texts that are too long to tokenize."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tokenizers import Encoding, Tokenizer

# Number of characters that are tokenized at first, at least, and for each token that is wanted.
_FIRST_SIZE = 4096
_CHARACTERS_PER_TOKEN = 8
# What has to follow the wanted tokens before a text may end: so many characters, with so many beginnings of words.
_MARGIN = 512
_WORDS = 16
_WORD_START = re.compile(r"\W\w")
# What a pattern cannot hold if a match is to depend on nothing far behind it.
_UNBOUNDED = re.compile(r"(?<!\\)\.[*+{]|\(\?=")


def copy_backend(backend: Tokenizer) -> Tokenizer:
    """Copy a tokenizer without truncation, padding and post-processor.

    The copy has tokens and settings of its own; the model, which no call changes, is shared. Copies by the library go
    through JSON, which takes seconds for a vocabulary of 260,000.
    """
    copied = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        if part is not None:
            setattr(copied, name, part)
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for is_special, tokens in groupby(added, key=lambda token: token.special):
        (copied.add_special_tokens if is_special else copied.add_tokens)(list(tokens))
    if copied.get_added_tokens_decoder().keys() != backend.get_added_tokens_decoder().keys():
        # Ids that are not in the order in which tokens are added.
        copied = Tokenizer.from_str(backend.to_str())
        copied.no_truncation()
        copied.no_padding()
    return copied


def first_size(limit: int) -> int:
    """Return the number of characters that are tokenized at first for `limit` tokens; shorter texts are whole."""
    return max(_FIRST_SIZE, _CHARACTERS_PER_TOKEN * limit)


def first_tokens(backend: Tokenizer, text: str, limit: int, lookahead: int | None) -> Encoding:
    """Tokenize a prefix long enough that its first `limit` tokens match those of the full text.

    Tokens depend on text behind them: on the rest of a word, of a run of spaces or of combining marks, on an added
    token that begins in them. So the beginning of a text is tokenized for the whole only if many words begin behind the
    wanted tokens, and if a longer beginning gives the same ones; otherwise more of it is, and in the end all of it.

    Args:
        backend: The tokenizer.
        text: Text of any length.
        limit: Number of tokens wanted.
        lookahead: Maximum number of characters of tokenizer look-ahead, from `reach`; None if unbounded.

    Returns:
        The encoding of the text, or of a prefix of it that has more than `limit` tokens.
    """
    size = first_size(limit)
    while lookahead is not None and 2 * size < len(text):
        if len(_WORD_START.findall(text, size // 2, size)) < _WORDS:
            size *= 4
            continue
        # Of odd and of even length, in case that tokens of a periodic text depend on it.
        shorter, longer = (backend.encode(text[:end], add_special_tokens=False) for end in (size, size * 5 // 4 + 1))
        if len(shorter.ids) > limit and shorter.ids[:limit] == longer.ids[:limit]:
            end = max((end for _, end in shorter.offsets[:limit]), default=0)
            behind = text[end:size]
            if len(behind) >= _MARGIN + lookahead and len(_WORD_START.findall(behind)) >= _WORDS:
                return longer
        size *= 4
    return backend.encode(text, add_special_tokens=False)


def reach(backend: Tokenizer) -> int | None:
    """Return how many characters a tokenizer looks ahead for a match, beyond a run of similar ones; None if unbounded.

    Added tokens and replaced strings are matched in whole.
    """
    lengths = [len(token.content) for token in backend.get_added_tokens_decoder().values()]
    for part in (backend.normalizer, backend.pre_tokenizer):
        if part is None:
            continue
        try:
            state = json.loads(part.__getstate__())
        except Exception:
            # Written in Python, by users.
            return None
        for kind, pattern in _patterns(state):
            if kind == "String":
                lengths.append(len(pattern))
            elif _UNBOUNDED.search(pattern):
                return None
    return max(lengths, default=0)


def _patterns(state: Any) -> Iterator[tuple[str, str]]:
    """Yield kind (`String` or `Regex`) and text of all patterns in the settings of a normalizer or pre-tokenizer."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key in ("String", "Regex") and isinstance(value, str):
                yield key, value
            else:
                yield from _patterns(value)
    elif isinstance(state, list):
        for value in state:
            yield from _patterns(value)
