"""Queries extracted from documents, and cross-lingual titles: `python -m recipes.default_model.written_queries`.

Two queries per passage of `corpora` (title, claim, keywords, short search, question, or a question that the text asks),
and, where a source of `general` has the same page in several languages, titles in one language for pages in another.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from . import sources
from .human_rows import write_lines
from .package import ExtractiveGenerator, QueryRequest, without_copy

PER_DOCUMENT = 2
CROSS_LINGUAL = 3500
# Fewest documents of a language that suffice to tell rare words from common ones.
FEWEST = 15
_MAX_CHARS, _MIN_CHARS = 200, 6
_QUESTION = re.compile(r"[^.!?。？！؟\n]{8,140}[?？؟]")
_PART = re.compile(r"\s+[–—|]\s+")


def extractive(source: sources.Source, seed: int = 0) -> list[dict]:
    """Written queries of a source: `_id`, `text`, `document`, `style`, `language`."""
    documents = [{"_id": name, **document} for name, document in source.documents.items()]
    titles = Counter(document["title"] for document in documents)
    # Word frequencies are per language.
    by_language: dict[str, list[dict]] = defaultdict(list)
    for document in documents:
        by_language[sources.language_of(source, document["_id"])].append(document)
    generators = {
        language: ExtractiveGenerator(language_documents, seed) for language, language_documents in by_language.items()
    }
    rows = []
    for document in documents:
        name = document["_id"]
        if sources.is_held_out(source.name, name):
            continue
        rng = random.Random(f"{seed}/{source.name}/{name}")
        language = sources.language_of(source, name)
        generator = generators[language]
        if len(by_language[language]) < FEWEST:
            continue
        questions = [question.strip() for question in _QUESTION.findall(document["text"])]
        styles = ["claim", "keywords", "short", "question"]
        if document["title"] and titles[document["title"]] == 1:
            styles += ["title", "title"]
        if questions:
            styles += ["asked"]
        rng.shuffle(styles)
        style_of: dict[str, str] = {}
        for style in styles:
            if len(style_of) == PER_DOCUMENT:
                break
            if style == "asked":
                text = rng.choice(questions)
            elif style == "short":
                words = generator.generate([QueryRequest(document, "keywords", language)])[0].split()
                text = " ".join(words[: rng.choice((2, 3))])
            else:
                text = generator.generate([QueryRequest(document, style, language)])[0]
            if style == "title" and rng.random() < 0.5:
                text = _PART.split(text)[-1]
            if style == "claim" and rng.random() < 0.3:
                text = text.lower()
            text = " ".join(text.split())
            if len(text) > _MAX_CHARS:
                text = text[:_MAX_CHARS].rsplit(" ", 1)[0]
            if len(text) < _MIN_CHARS or text in style_of or without_copy(document, text) is None:
                continue
            style_of[text] = style
        rows += [
            {"_id": f"{name}/{style}", "text": text, "document": name, "style": style, "language": language}
            for text, style in style_of.items()
        ]
    return rows


def cross_lingual(data: Path, name: str, seed: int = 0) -> list[dict]:
    """Titles and index entries in one language, for pages of the source in another.

    `native` is a title of the page in its own language, by which BM25 retrieves candidates.
    """
    source = sources.load(data, "general", name)
    family = (
        [name]
        if not name.startswith("lohelp")
        else [
            sibling
            for sibling in sources.names(data, "general")
            if sibling.startswith("lohelp") and sibling not in sources.HELD_OUT
        ]
    )
    titles: dict[str, list[tuple[str, str]]] = defaultdict(list)
    native: dict[str, str] = {}
    languages: dict[str, str] = {}
    for sibling in family:
        other = source if sibling == name else sources.load(data, "general", sibling)
        for query, text in other.queries.items():
            if query.endswith("_x"):
                continue
            for document, grade in other.qrels[query].items():
                if grade > 0:
                    titles[_page(other, document)].append((sources.language_of(other, query), text))
                    if other is source:
                        languages[document] = sources.language_of(other, query)
                        native.setdefault(document, text)
    rows = []
    for document in sorted(source.documents, key=lambda document: sources.fraction("cross", name, document)):
        language = languages.get(document) or sources.language_of(source, document)
        others = sorted(
            {
                (title_language, title)
                for title_language, title in titles[_page(source, document)]
                if title_language != language
            }
        )
        if not others or sources.is_held_out(name, document):
            continue
        rng = random.Random(f"{seed}/cross/{name}/{document}")
        query_language = rng.choice(sorted({title_language for title_language, _ in others}))
        text = rng.choice([title for title_language, title in others if title_language == query_language])
        row = {"_id": f"{document}/cross", "text": text, "document": document, "style": "cross_lingual"}
        rows.append(row | {"language": query_language, "native": native.get(document) or _opening(source, document)})
        if len(rows) == CROSS_LINGUAL:
            break
    return rows


def _opening(source: sources.Source, document: str) -> str:
    return " ".join(source.documents[document]["text"].split()[:12])[:120]


def _page(source: sources.Source, document: str) -> str:
    if source.name == "tldr_commands":
        # The same command line explained in several languages.
        return source.documents[document]["text"].splitlines()[-1]
    return sources.page_of(source.name, document)


def main() -> None:
    """Write the queries of all sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/queries"))
    settings = parser.parse_args()
    for name in sources.names(settings.data, "general"):
        if name.startswith(("gnome_help", "lohelp", "tldr_commands")) and name not in sources.HELD_OUT:
            path = settings.out / f"{name}.jsonl"
            if not path.exists():
                rows = cross_lingual(settings.data, name)
                write_lines(path, rows)
                print(f"{name}: {len(rows)} cross-lingual queries", flush=True)
    for name in sources.names(settings.data, "corpora"):
        path = settings.out / f"{name}.jsonl"
        if not path.exists():
            rows = extractive(sources.load(settings.data, "corpora", name))
            write_lines(path, rows)
            print(f"{name}: {len(rows)} queries {dict(Counter(row['style'] for row in rows))}", flush=True)


if __name__ == "__main__":
    main()
