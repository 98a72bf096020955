"""Rows to train and validate on, from what a user names: files of rows, BEIR folders, datasets."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from .mining import Bands, judged_rows, mine_rows
from .reading import Rejects, read_rows, read_table
from .rows import Row
from .settings import DataArguments

logger = logging.getLogger(__name__)

_ROW_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def training_rows(args: DataArguments, seed: int, rejects: Rejects) -> list[Row]:
    """Rows of files as they stand, then those mined from collections, evenly interleaved."""
    rows: list[Row] = []
    mined: list[tuple[float, Row]] = []
    guard = _load_guard(args.guard)
    for source in args.train:
        if not is_collection(source):
            rows += stream_rows([source], args, seed, rejects)
            continue
        collection = _load(source, "train")
        found = mine_rows(
            collection,
            bands=args.bands,
            retriever=_retriever(args.encoder, collection),
            guard=guard,
            guard_margin=args.guard_margin,
            easy_first=args.easy_first,
            limit=args.limit,
            max_chars=args.max_chars,
            seed=seed,
        )
        logger.info("%s: %d queries.", source, len(found))
        # Each collection is spread over the whole run, so that its easy rows come first and none comes in a lump.
        mined += [(number / len(found), row) for number, row in enumerate(found)]
    return rows + [row for _, row in sorted(mined, key=lambda pair: pair[0])]


def validation_rows(args: DataArguments, seed: int, rejects: Rejects) -> dict[str, list[Row]]:
    """Rows of each validation source, by its name: all judged documents, or the first stage's best."""
    found: dict[str, list[Row]] = {}
    for source in args.validation:
        name = Path(source.partition(":")[0]).name.partition(".")[0]
        if name in found:
            raise ValueError(f"Two validation sources are called {name!r}: rename one, their figures are told by name.")
        if is_collection(source):
            collection = _load(source, "dev")
            retriever = _retriever(args.encoder, collection)
            found[name] = judged_rows(collection, retriever, args.validation_depth, args.limit, seed)
        else:
            found[name] = list(stream_rows([source], None, seed, rejects))
    return found


def stream_rows(
    sources: Sequence[str], args: DataArguments | None, seed: int, rejects: Rejects | None = None
) -> Iterator[Row]:
    """Rows of files and datasets, one after the other; documents drawn by bands if `args` says so."""
    for source in sources:
        if source.endswith(_ROW_FILES):
            rows = read_rows(source, rejects)
        else:
            name, _, split = source.partition(":")
            rows = read_table(name, split or "train", rejects)
        for number, row in enumerate(rows):
            if args is not None and args.sample_rows:
                row = sample_documents(row, args.bands, random.Random(f"{seed}/{source}/{number}"))
            yield row


def sample_documents(row: Row, bands: Bands, rng: random.Random) -> Row:
    """A row with some of its documents, drawn from `bands`; those with a label above 0 all stay.

    Args:
        row: Its documents are in the order of a first stage.
        bands: How many from where.
        rng: Of the draw.
    """
    labels = row.get("labels") or [0] * len(row["documents"])
    relevant = [place for place, label in enumerate(labels) if label > 0]
    others = [place for place, label in enumerate(labels) if label <= 0]
    places = sorted([*relevant, *bands.draw(others, [], rng)])

    def pick(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[place] for place in places]

    drawn = row | {"documents": pick(row["documents"])}
    if row.get("labels") is not None:
        drawn["labels"] = pick(row["labels"])
    if row.get("scores") is not None:
        drawn["scores"] = {teacher: pick(values) for teacher, values in row["scores"].items()}
    return drawn


def is_collection(source: str) -> bool:
    """Whether a source is a folder in the BEIR layout, `FOLDER` or `FOLDER:SPLIT`."""
    return os.path.isdir(source.partition(":")[0])


def files_of(source: str) -> list[Path]:
    """The files on this disk that a source is read from."""
    folder, _, split = source.partition(":")
    if not is_collection(source):
        return [Path(source)] if os.path.exists(source) else []
    names = ("corpus.jsonl*", "queries.jsonl*", f"qrels/{split or '*'}.tsv*", f"candidates/{split or '*'}.tsv*")
    return sorted(path for name in names for path in Path(folder).glob(name))


def _load(source: str, split: str) -> Collection:
    folder, _, named = source.partition(":")
    return Collection.load(folder, named or split)


def _retriever(encoder: str | None, collection: Collection) -> Any:
    if encoder is None:
        return BM25(collection.documents)
    from ..retrieval.dense import DenseIndex, load_encoder

    return DenseIndex(collection.documents, load_encoder(encoder))


def _load_guard(name: str | None) -> Any:
    if name is None:
        return None
    from ..checkpoints.loading import load_model

    return load_model(name)
