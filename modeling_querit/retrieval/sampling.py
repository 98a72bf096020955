"""Sampling of the documents that a query is trained on, from bands of a first stage's ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Retriever(Protocol):
    """A first stage: `BM25`, `DenseIndex`, or any index with the same method."""

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """Return for each query its `k` best (document id, score), best first."""


@dataclass(frozen=True)
class Bands:
    """Numbers of documents to draw from the bands of a ranking.

    Args:
        top: Number of documents from ranks 1 to `top_depth`.
        middle: Number of documents from the ranks after that, up to `depth`.
        random: Number of documents from the rest of the collection.
        top_depth: Last rank of the top band.
        depth: Last rank of the middle band.

    Raises:
        ValueError: if no document is drawn, or the ranks are not `0 < top_depth <= depth`.
    """

    top: int = 2
    middle: int = 0
    random: int = 1
    top_depth: int = 30
    depth: int = 100

    def __post_init__(self) -> None:
        if min(self.top, self.middle, self.random) < 0 or self.size < 1:
            raise ValueError(f"{self} draws no document: ask for at least one.")
        if not 0 < self.top_depth <= self.depth:
            raise ValueError(f"top_depth is {self.top_depth} and depth {self.depth}: 0 < top_depth <= depth.")

    @property
    def size(self) -> int:
        """Total number of documents."""
        return self.top + self.middle + self.random

    def draw(self, ranked: Sequence[Item], others: Sequence[Item], rng: Random) -> list[Item]:
        """Draw documents from each band; if a band has too few, the next one makes up for it.

        Args:
            ranked: Documents of the ranking, best first.
            others: Documents that are not in the ranking; they and the ranks beyond `depth` are the random band.
            rng: Random number generator.
        """
        bands = (
            (self.top, ranked[: self.top_depth]),
            (self.middle, ranked[self.top_depth : self.depth]),
            (self.random, [*ranked[self.depth :], *others]),
        )
        chosen: list[Item] = []
        target = 0
        for count, band in bands:
            target += count
            chosen += rng.sample(band, min(target - len(chosen), len(band)))
        return chosen
