"""Documents as people have them: their text and their id, whichever library they are from.

Nothing of those libraries is imported: their documents are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .arguments_querit import describe
from .pair_encoding_querit import Document

_ACCEPTED = (
    "a string, a mapping with a 'text' and perhaps a 'title' and an 'id' or '_id', an (id, text) tuple, or a document "
    "of LangChain, LlamaIndex, Haystack or rerankers"
)


class _Library(NamedTuple):
    """How the documents of a library are recognized and read.

    Args:
        attributes: Attributes that its documents have, and those of the libraries after it have not.
        text: Function from a document to its text.
        id_attribute: Attribute that holds the id.
    """

    attributes: tuple[str, ...]
    text: Callable[[Any], Any]
    id_attribute: str


_LIBRARIES = (
    # LlamaIndex: nodes with and without a score. Its own rerankers score this text, with the metadata that the node
    # does not exclude from embeddings.
    _Library(("get_content", "node_id"), lambda node: node.get_content(metadata_mode="embed"), "node_id"),
    # LangChain.
    _Library(("page_content", "metadata"), lambda document: document.page_content, "id"),
    # Haystack.
    _Library(("content", "meta", "id"), lambda document: document.content, "id"),
    # rerankers.
    _Library(("text", "doc_id", "metadata"), lambda document: document.text, "doc_id"),
)


def document_content(document: Any, index: int) -> Document:
    """Return what of a document is scored: its text, with a title as `{"title", "text"}`.

    Args:
        document: A string; a mapping with a "text" and perhaps a "title"; an (id, text) tuple or list, where the text
            may be such a mapping; or a document of LangChain (`page_content`), LlamaIndex (a node, whose text is
            `get_content` with the metadata for embeddings), Haystack (`content`) or rerankers (`text`).
        index: Index of the document or pair, for the error message.

    Raises:
        TypeError: if it is none of these, or its text or title is not a string.

    Example:
        ```python
        >>> document_content(("d1", "A tragedy by Goethe."), 0)
        'A tragedy by Goethe.'
        ```
    """
    if _is_pair_with_id(document):
        document = document[1]
    title = None
    if isinstance(document, str):
        text: Any = document
    elif isinstance(document, Mapping) and "text" in document:
        text, title = document["text"], document.get("title")
    elif (library := _library_of(document)) is not None:
        text = library.text(document)
    else:
        raise TypeError(f"Document {index} is {describe(document)}: give {_ACCEPTED}.")
    for name, value in (("text", text), ("title", "" if title is None else title)):
        if not isinstance(value, str):
            raise TypeError(f"The {name} of document {index} is {describe(value)}: give {_ACCEPTED}.")
    return {"title": title, "text": text} if title else text


def document_id(document: Any) -> Any:
    """Return the id of a document that `document_content` accepts, of whatever type it is; None if it has none.

    Of a mapping with both, `_id` counts, as in the BEIR layout; of an (id, document) tuple, the id of the tuple.
    """
    if isinstance(document, str):
        return None
    if _is_pair_with_id(document):
        return document[0]
    if isinstance(document, Mapping):
        identifier = document.get("_id")
        return document.get("id") if identifier is None else identifier
    library = _library_of(document)
    return None if library is None else getattr(document, library.id_attribute, None)


def _is_pair_with_id(document: Any) -> bool:
    """Whether a document is (id, text); (text, score) and (score, text), which other libraries return, are not."""
    if not isinstance(document, tuple | list) or len(document) != 2:
        return False
    identifier, text = document
    return isinstance(identifier, str | int) and not isinstance(identifier, bool) and isinstance(text, str | Mapping)


def _library_of(document: Any) -> _Library | None:
    matching = (
        library for library in _LIBRARIES if all(hasattr(document, attribute) for attribute in library.attributes)
    )
    return next(matching, None)
