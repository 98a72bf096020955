"""What language models are asked for: a query in one of four styles, in the language of the document."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .corpus import Document

# What a query of each style is, and the name of the field it goes in.
STYLES = {
    "question": ("a question that a person would ask, and that this document answers", "Question"),
    "keywords": (
        "two to six search keywords with which a person would look for this document, without a verb",
        "Search",
    ),
    "claim": ("one sentence with a claim that this document supports or refutes", "Claim"),
    "title": ("a short title that this document could have", "Title"),
}
_LANGUAGES = {
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
class Request:
    """A query to be written.

    Args:
        document: For which one.
        style: One of `STYLES`.
        language: ISO 639-1 code that the query is to be in; `und`: whatever the document is in.
        examples: Real queries of the target collection, which show what its users write.
    """

    document: Document
    style: str
    language: str
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style is {self.style!r}: choose from {', '.join(STYLES)}.")


def read_examples(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}, which queries.examples names.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}; save it as UTF-8.") from None
    return [line.strip() for line in lines if line.strip()]


def instruction_of(request: Request, template: str = INSTRUCTION) -> str:
    """What a model is told to do; `${style}`, `${field}` and `${language}` of the template are filled in."""
    style, field = STYLES[request.style]
    language = _LANGUAGES.get(request.language)
    values = {"style": style, "field": field.lower(), "language": f", in {language}" if language else ""}
    return string.Template(template).safe_substitute(values)


def messages_of(request: Request, template: str = INSTRUCTION) -> list[dict[str, str]]:
    """A conversation for models with a chat template."""
    content = instruction_of(request, template)
    if request.examples:
        content += "\n\nWhat people search this collection for:\n" + _listed(request.examples)
    document = request.document
    title = f"Title: {document['title']}\n" if document["title"] else ""
    return [{"role": "user", "content": f"{content}\n\nDocument:\n{title}{document['text']}"}]


def completion_of(request: Request, shots: Sequence[tuple[Document, str]] = ()) -> str:
    """Text to continue, for models without a chat template: examples of documents and queries, then the document."""
    field = STYLES[request.style][1]
    parts = [f"Document: {_text(document)}\n{field}: {query}" for document, query in shots]
    if request.examples:
        parts.insert(0, "What people search for:\n" + _listed(request.examples))
    return "\n\n".join([*parts, f"Document: {_text(request.document)}\n{field}:"])


def _text(document: Document) -> str:
    return f"{document['title']}. {document['text']}" if document["title"] else document["text"]


def _listed(examples: Sequence[str]) -> str:
    return "\n".join(f"- {example}" for example in examples)
