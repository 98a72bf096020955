"""Queries and documents of a collection as streams: BEIR folders, tables of tab-separated columns, `ir_datasets`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..files import decode_line, read_jsonl, read_lines
from ..pair_encoding_querit import document_text
from .collection import check_text

# What is called with the error and the raw line instead of raising.
OnError = Callable[[ValueError, Any], None]

# Before the id of one of its datasets.
IR_DATASETS_PREFIX = "ir_datasets:"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz")
# Names of the first column in the header of a table.
_HEADERS = {"_id", "id", "docid", "doc_id", "pid", "qid", "query_id", "query-id"}


class Text(NamedTuple):
    """A query, or a document, whose title and text are joined by a space.

    Args:
        location: File and line it was read from, for error messages.
        id: Id of the query or document.
        text: Title and text, or the query.
    """

    location: str
    id: str
    text: str


@dataclass(frozen=True)
class Texts:
    """The queries, or the documents, of a collection, which can be streamed any number of times.

    Args:
        name: Name for error messages: that of the file.
        read: Function that streams them; it gets the callback for broken lines, or None to raise.
        files: Files that they are read from; none if another library knows.
    """

    name: str
    read: Callable[[OnError | None], Iterator[Text]]
    files: tuple[Path, ...] = ()


def open_texts(collection: str | os.PathLike[str]) -> tuple[Texts, Texts]:
    """Find the queries and the documents of a collection, without reading them.

    Args:
        collection: Folder with `corpus` and `queries`, both `.jsonl` (rows with `_id`, `text` and perhaps a `title`, as
            in BEIR) or `.tsv` (id and text, or id, title and text), gzipped or not; or `ir_datasets:ID`, such as
            `ir_datasets:msmarco-passage/dev/small`.

    Returns:
        The queries, and the documents.

    Raises:
        FileNotFoundError: if there is no such folder, file or id.
        ModuleNotFoundError: if `ir_datasets` is asked for and not installed.

    Example:
        ```python
        >>> queries, documents = open_texts("examples/linux_howto")
        >>> next(documents.read(None)).id
        'd01'
        ```
    """
    if str(collection).startswith(IR_DATASETS_PREFIX):
        return _open_ir_dataset(str(collection).removeprefix(IR_DATASETS_PREFIX))
    folder = Path(collection).expanduser()
    if folder.is_dir():
        return _texts_of(folder, "queries"), _texts_of(folder, "corpus")
    if folder.exists():
        raise NotADirectoryError(f"{collection} is a file: name the folder with corpus.jsonl and queries.jsonl.")
    raise FileNotFoundError(f"There is no folder {collection}; a dataset of ir_datasets is written ir_datasets:ID.")


def _texts_of(folder: Path, name: str) -> Texts:
    path = next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {name}.jsonl or {name}.tsv (or .gz): a collection is a folder with corpus and queries."
        )
    read = _read_jsonl if ".jsonl" in path.suffixes else _read_table
    return Texts(str(path), partial(read, path, name == "corpus"), (path,))


def _read_jsonl(path: Path, has_titles: bool, on_error: OnError | None) -> Iterator[Text]:
    for location, row in read_jsonl(path, on_error):
        try:
            check_text(row, location)
        except ValueError as error:
            _refuse(error, row, on_error)
        else:
            # A query has no title, and keeps its white space: it is what `evaluate` and `rank` are given.
            yield Text(location, str(row["_id"]), document_text(row) if has_titles else row["text"])


def _read_table(path: Path, has_titles: bool, on_error: OnError | None) -> Iterator[Text]:
    for number, (location, line) in enumerate(read_lines(path)):
        try:
            columns = decode_line(line, location).split("\t")
            if number == 0 and columns[0].lower() in _HEADERS:
                continue
            if not 2 <= len(columns) <= 3:
                raise ValueError(
                    f"{location}: expected id and text, or id, title and text, separated by tabs, "
                    f"found {len(columns)} columns."
                )
        except ValueError as error:
            _refuse(error, line.decode(errors="replace"), on_error)
        else:
            title = columns[1] if len(columns) == 3 else ""
            text = document_text({"title": title, "text": columns[-1]}) if has_titles else columns[-1]
            yield Text(location, columns[0], text)


def _refuse(error: ValueError, row: Any, on_error: OnError | None) -> None:
    if on_error is None:
        raise error from None
    on_error(error, row)


def _open_ir_dataset(name: str) -> tuple[Texts, Texts]:
    if not find_spec("ir_datasets"):
        raise ModuleNotFoundError(f"{name} needs ir_datasets: pip install 'modeling-querit[ir-datasets]'.")
    import ir_datasets

    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise FileNotFoundError(f"{name} is no dataset of ir_datasets: see https://ir-datasets.com.") from None
    for has, kind in ((dataset.has_queries(), "queries"), (dataset.has_docs(), "documents")):
        if not has:
            raise FileNotFoundError(f"{name}: this id of ir_datasets has no {kind}: name one that has.")

    def read_queries(_: OnError | None) -> Iterator[Text]:
        for number, query in enumerate(dataset.queries_iter(), start=1):
            yield Text(f"{name}, query {number}", query.query_id, query.default_text())

    def read_documents(_: OnError | None) -> Iterator[Text]:
        for number, document in enumerate(dataset.docs_iter(), start=1):
            yield Text(f"{name}, document {number}", document.doc_id, _text_of(document))

    return Texts(f"the queries of {name}", read_queries), Texts(f"the documents of {name}", read_documents)


def _text_of(document: Any) -> str:
    """Title and text as everywhere here, or what `ir_datasets` takes for the text where there are other fields."""
    fields = getattr(document, "_fields", ())
    if "text" in fields and isinstance(document.text, str):
        title = document.title if "title" in fields and isinstance(document.title, str) else ""
        return document_text({"title": title, "text": document.text})
    return document_text(document.default_text())
