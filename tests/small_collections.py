"""Small collections in the layouts in which people have them."""

import json
import random

WORDS = ["fox", "hen", "cow", "owl", "the", "red", "book", "judge", "novel", "content", "query", "who", "wrote"]


def make_texts(documents=30, queries=12, seed=0):
    """Documents by id, queries by id, and grades, of which some are 0."""
    rng = random.Random(seed)
    corpus = {f"d{number}": " ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for number in range(documents)}
    texts = {f"q{number}": " ".join(rng.choices(WORDS, k=3)) for number in range(queries)}
    qrels = {query: {document: rng.randint(0, 2) for document in rng.sample(sorted(corpus), 5)} for query in texts}
    return corpus, texts, qrels


def write_beir(folder, corpus, texts, qrels, split="test"):
    """A folder in the BEIR layout."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "corpus.jsonl", ({"_id": name, "title": "", "text": text} for name, text in corpus.items()))
    write_rows(folder / "queries.jsonl", ({"_id": name, "text": text} for name, text in texts.items()))
    lines = [f"{query}\t{document}\t{grade}\n" for query, grades in qrels.items() for document, grade in grades.items()]
    (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def with_local_data(task, documents=12, queries=3):
    """Give a task of mteb a small collection with listed candidates, as if it had been downloaded."""
    from datasets import Dataset

    corpus, texts, qrels = make_texts(documents, queries)
    task.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_list(
                    [{"id": name, "title": f"Title {name}", "text": text} for name, text in corpus.items()]
                ),
                "queries": Dataset.from_list([{"id": name, "text": text} for name, text in texts.items()]),
                "relevant_docs": qrels,
                "top_ranked": {query: list(grades) for query, grades in qrels.items()},
            }
        }
    }
    task.data_loaded = True
    return task
