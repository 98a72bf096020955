"""Prompts for query generation: a query in one of four styles, in the language of the document."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..files import decode_line, read_lines
from .corpus import CorpusDocument

# Style -> what such a query is, and the name of the field that it goes in.
STYLES = {
    "question": ("a question that a person would ask, and that this document answers", "Question"),
    "keywords": (
        "two to six search keywords with which a person would look for this document, without a verb",
        "Search",
    ),
    "claim": ("one sentence with a claim that this document supports or refutes", "Claim"),
    "title": ("a short title that this document could have", "Title"),
}
_LANGUAGE_NAMES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
INSTRUCTION = (
    "Write ${style}. It makes sense to somebody who has not seen the document, and does not copy its sentences. "
    "Answer with nothing but the ${field}, on one line${language}."
)


@dataclass(frozen=True)
class QueryRequest:
    """A query to be written for a document.

    Args:
        document: The document that the query is for.
        style: One of `STYLES`.
        language: ISO 639-1 code of the query's language; `und` for the language of the document.
        examples: Real queries of the target collection, which show the model what users write.

    Raises:
        ValueError: if the style is unknown.
    """

    document: CorpusDocument
    style: str
    language: str
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style is {self.style!r}: choose from {', '.join(STYLES)}.")


def read_examples(path: Path) -> list[str]:
    """Read example queries, one per line; blank lines are skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"queries.examples: no such file: {path}.")
    return [decode_line(line, place).strip() for place, line in read_lines(path)]


def instruction_of(request: QueryRequest, template: str = INSTRUCTION) -> str:
    """Fill in `${style}`, `${field}` and `${language}` of an instruction template."""
    style, field = STYLES[request.style]
    language = _LANGUAGE_NAMES.get(request.language)
    values = {"style": style, "field": field.lower(), "language": f", in {language}" if language else ""}
    return string.Template(template).safe_substitute(values)


def messages_of(request: QueryRequest, template: str = INSTRUCTION) -> list[dict[str, str]]:
    """Make the conversation for models with a chat template: one message of the user."""
    content = instruction_of(request, template)
    if request.examples:
        content += "\n\nWhat people search this collection for:\n" + _bullets(request.examples)
    document = request.document
    title = f"Title: {document['title']}\n" if document["title"] else ""
    return [{"role": "user", "content": f"{content}\n\nDocument:\n{title}{document['text']}"}]


def completion_of(request: QueryRequest, shots: Sequence[tuple[CorpusDocument, str]] = ()) -> str:
    """Make a few-shot prompt for models without a chat template.

    Args:
        request: The query to be written.
        shots: (document, query) pairs that come before it.
    """
    field = STYLES[request.style][1]
    parts = [f"Document: {_as_sentences(document)}\n{field}: {query}" for document, query in shots]
    if request.examples:
        parts.insert(0, "What people search for:\n" + _bullets(request.examples))
    return "\n\n".join([*parts, f"Document: {_as_sentences(request.document)}\n{field}:"])


def without_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Replace the names of a tokenizer's special tokens by spaces, so that a text cannot inject them."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, " ")
    return text


def _as_sentences(document: CorpusDocument) -> str:
    """Join title and text as prose: a base model continues sentences better than fields that run together."""
    return f"{document['title']}. {document['text']}" if document["title"] else document["text"]


def _bullets(examples: Sequence[str]) -> str:
    return "\n".join(f"- {example}" for example in examples)
