"""Generate queries for passages with a language model: `python -m recipes.default_model.model_queries`.

A question and a keyword search per passage, in its language, by Qwen2.5 1.5B (GGUF; needs `xllamacpp`). Resumable;
sources are interleaved, so that it can be stopped at any time. `rows` keeps only queries whose passage the strong
encoder ranks first among BM25's candidates. A passage takes several seconds on one thread: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from . import sources

LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "pt-BR": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese", "zh-TW": "Chinese",
}  # fmt: skip
TASK = (
    "Here is a passage.\n\n{text}\n\nSomebody who has never seen it needs what it says. Write in {language} what they "
    "would ask or type, in other words than the passage's. Two lines:\nQuestion: a question that the passage answers\n"
    "Search: two to five keywords"
)
_LINE = re.compile(r"^\W*(Question|Search)\W*[:：]\s*(.+?)\s*$", re.MULTILINE)


def queries_of(answer: str) -> dict[str, str]:
    """The question and the keyword search in an answer.

    Example:
        ```python
        >>> queries_of("Question: What is it?\\nSearch: it")
        {'Question': 'What is it?', 'Search': 'it'}
        ```
    """
    return {kind: text.strip("\"'“”* ") for kind, text in _LINE.findall(answer) if 2 < len(text) < 200}


def passages(data: Path, seen: set[str]) -> Iterator[tuple[str, str, str, str]]:
    """Passages of all sources, interleaved, as (source, id, language, text), in a fixed random order."""
    waiting = []
    for name in sources.names(data, "corpora"):
        source = sources.load(data, "corpora", name)
        chosen = [
            document
            for document in source.documents
            if not sources.is_held_out(name, document) and document not in seen
        ]
        waiting.append((source, sorted(chosen, key=lambda document: sources.fraction("model", document))))
    for index in range(max(len(chosen) for _, chosen in waiting)):
        for source, chosen in waiting:
            if index < len(chosen):
                document = source.documents[chosen[index]]
                language = sources.language_of(source, chosen[index])
                if language in LANGUAGES:
                    yield source.name, chosen[index], language, f"{document['title']}\n{document['text'][:900]}".strip()


def main() -> None:
    """Generate queries until `--passages` have them, or until stopped."""
    import xllamacpp

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("runs/weights/qwen2.5-coder-1.5b/model.gguf"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/queries"))
    parser.add_argument("--passages", type=int, default=2000, help="passages in total")
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = str(settings.weights)
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    server = xllamacpp.Server(params)
    settings.out.mkdir(parents=True, exist_ok=True)
    lines = [line for path in settings.out.glob("*.model.jsonl") for line in path.read_text("utf-8").splitlines()]
    seen = {json.loads(line)["document"] for line in lines}
    began = time.monotonic()
    wanted = islice(passages(settings.data, seen), max(0, settings.passages - len(seen)))
    for done, (name, document, language, text) in enumerate(wanted, start=1):
        task = TASK.format(text=text, language=LANGUAGES[language])
        answer = server.handle_chat_completions(
            {"messages": [{"role": "user", "content": task}], "max_tokens": 90, "temperature": 0.7, "seed": done}
        )
        queries = queries_of(answer["choices"][0]["message"]["content"])
        with (settings.out / f"{name}.model.jsonl").open("a", encoding="utf-8") as out:
            for kind, query in queries.items():
                row = {"_id": f"{document}/{kind}", "text": query, "document": document, "style": "model"}
                out.write(json.dumps(row | {"language": language}, ensure_ascii=False) + "\n")
        if done % 10 == 0:
            seconds = (time.monotonic() - began) / done
            left = (settings.passages - len(seen) - done) * seconds / 3600
            print(f"{len(seen) + done} passages, {seconds:.1f} s per passage, {left:.1f} h left", flush=True)


if __name__ == "__main__":
    main()
