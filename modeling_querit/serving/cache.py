"""Scores of earlier pairs, kept in memory: the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from hashlib import blake2b

from ..pair_encoding_querit import Pair, document_text

# A key of 16 bytes, a float and their place in an ordered dictionary, as CPython stores them.
_BYTES_PER_SCORE = 256


class ScoreCache:
    """An LRU of scores by the hash of what the model reads; safe to use from several threads.

    Args:
        megabytes: Memory for it, in MB; 0 keeps nothing.
    """

    def __init__(self, megabytes: int):
        self._capacity = megabytes * 1_000_000 // _BYTES_PER_SCORE
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: bytes) -> float | None:
        """Return the score of a pair, if it is known."""
        with self._lock:
            score = self._scores.get(key)
            if score is not None:
                self._scores.move_to_end(key)
            return score

    def put(self, key: bytes, score: float) -> None:
        """Keep a score."""
        if not self._capacity:
            return
        with self._lock:
            self._scores[key] = score
            self._scores.move_to_end(key)
            if len(self._scores) > self._capacity:
                self._scores.popitem(last=False)


def pair_key(pair: Pair, instruction: str | None, max_length: int | None) -> bytes:
    """Hash all that decides the score of a pair, to 16 bytes."""
    query, document = pair
    parts = (repr((instruction, max_length)), query, document_text(document))
    digest = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        # Lengths first, so that no text can pass for the end of one and the start of the next.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
