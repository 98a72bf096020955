"""Queries taken from documents, and titles across languages: `python -m recipes.default_model.written_queries`.

Two queries a passage of `corpora` (title, first sentence, claim, keywords, a short search, a question that the text
asks), and, where a source of `general` holds the same page in several languages, the title of one for the other.
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
# Documents of a language, fewer of which do not tell its rare words from its common ones.
FEWEST = 15
_MAX_CHARS, _MIN_CHARS = 200, 6
_QUESTION = re.compile(r"[^.!?。？！؟\n]{8,140}[?？؟]")
_PART = re.compile(r"\s+[–—|]\s+")


def extractive(source: sources.Source, seed: int = 0) -> list[dict]:
    """Written queries of a source: `_id`, `text`, `document`, `style`, `language`."""
    documents = [{"_id": name, **each} for name, each in source.documents.items()]
    titles = Counter(each["title"] for each in documents)
    # Words are rare or common within a language.
    by_language: dict[str, list[dict]] = defaultdict(list)
    for document in documents:
        by_language[sources.language_of(source, document["_id"])].append(document)
    generators = {language: ExtractiveGenerator(mine, seed) for language, mine in by_language.items()}
    rows = []
    for document in documents:
        name = document["_id"]
        if sources.is_held_back(source.name, name):
            continue
        rng = random.Random(f"{seed}/{source.name}/{name}")
        language = sources.language_of(source, name)
        generator = generators[language]
        if len(by_language[language]) < FEWEST:
            continue
        asked = [each.strip() for each in _QUESTION.findall(document["text"])]
        styles = ["claim", "keywords", "short", "question"]
        if document["title"] and titles[document["title"]] == 1:
            styles += ["title", "title"]
        if asked:
            styles += ["asked"]
        rng.shuffle(styles)
        found: dict[str, str] = {}
        for style in styles:
            if len(found) == PER_DOCUMENT:
                break
            if style == "asked":
                text = rng.choice(asked)
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
            if len(text) < _MIN_CHARS or text in found or without_copy(document, text) is None:
                continue
            found[text] = style
        rows += [
            {"_id": f"{name}/{style}", "text": text, "document": name, "style": style, "language": language}
            for text, style in found.items()
        ]
    return rows


def cross_lingual(data: Path, name: str, seed: int = 0) -> list[dict]:
    """Titles and index entries in one language, for pages in another that are in this source.

    `native` is a title of the page in its own language, by which BM25 finds candidates.
    """
    source = sources.load(data, "general", name)
    family = (
        [name]
        if not name.startswith("lohelp")
        else [
            each
            for each in sources.names(data, "general")
            if each.startswith("lohelp") and each not in sources.HELD_BACK
        ]
    )
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    native: dict[str, str] = {}
    spoken: dict[str, str] = {}
    for each in family:
        other = source if each == name else sources.load(data, "general", each)
        for query, text in other.queries.items():
            if query.endswith("_x"):
                continue
            for document, grade in other.qrels[query].items():
                if grade > 0:
                    asked[_page(other, document)].append((sources.language_of(other, query), text))
                    if other is source:
                        spoken[document] = sources.language_of(other, query)
                        native.setdefault(document, text)
    rows = []
    for document in sorted(source.documents, key=lambda each: sources.fraction("cross", name, each)):
        language = spoken.get(document) or sources.language_of(source, document)
        others = sorted({each for each in asked[_page(source, document)] if each[0] != language})
        if not others or sources.is_held_back(name, document):
            continue
        rng = random.Random(f"{seed}/cross/{name}/{document}")
        written_in = rng.choice(sorted({each[0] for each in others}))
        text = rng.choice([each[1] for each in others if each[0] == written_in])
        row = {"_id": f"{document}/cross", "text": text, "document": document, "style": "cross_lingual"}
        rows.append(row | {"language": written_in, "native": native.get(document) or _opening(source, document)})
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
        if name.startswith(("gnome_help", "lohelp", "tldr_commands")) and name not in sources.HELD_BACK:
            path = settings.out / f"{name}.jsonl"
            if not path.exists():
                rows = cross_lingual(settings.data, name)
                write_lines(path, rows)
                print(f"{name}: {len(rows)} queries across languages", flush=True)
    for name in sources.names(settings.data, "corpora"):
        path = settings.out / f"{name}.jsonl"
        if not path.exists():
            rows = extractive(sources.load(settings.data, "corpora", name))
            write_lines(path, rows)
            print(f"{name}: {len(rows)} queries {dict(Counter(row['style'] for row in rows))}", flush=True)


if __name__ == "__main__":
    main()
