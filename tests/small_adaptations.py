"""Small adaptations: tiny models, tiny collections."""

import json
import random
from pathlib import Path

from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.files import write_jsonl

ANIMALS = ["fox", "hen", "cow", "dog", "owl", "eel", "ant", "bee", "cat", "elk", "emu", "gnu"]
PLACES = ["river", "forest", "meadow", "mountain", "harbour", "desert"]
HABITS = ["sleeps through the winter", "eats what it finds at night", "builds a home of twigs", "hunts in small groups"]


def make_documents(count=36, seed=0):
    """Different sentences about animals."""
    rng = random.Random(seed)
    documents = []
    for number in range(count):
        animal, place, habit = ANIMALS[number % 12], PLACES[number // 2 % 6], HABITS[number // 3 % 4]
        text = f"The {animal} of the {place} number {number} {habit}. "
        text += f"It was first described by traveller {rng.randrange(1000)} near the {rng.choice(PLACES)}."
        documents.append({"_id": f"d{number}", "title": f"{animal} and {place} {number}", "text": text})
    return documents


def write_collection(folder: Path, documents=None):
    """Write a folder in the BEIR layout, whose queries are titles of documents."""
    documents = make_documents() if documents is None else documents
    write_jsonl(documents, folder / "corpus.jsonl")
    queries = [{"_id": f"q{n}", "text": document["title"]} for n, document in enumerate(documents[:6])]
    write_jsonl(queries, folder / "queries.jsonl")
    (folder / "qrels").mkdir()
    lines = [f"q{n}\t{document['_id']}\t1\n" for n, document in enumerate(documents[:6])]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def make_values(tmp_path, model, **sections):
    """Settings as in a YAML file."""
    values = {
        "output_dir": str(tmp_path / "run"),
        "corpus": {"source": str(tmp_path / "collection"), "sample": 12},
        "queries": {"per_document": 2, "round_trip": 10},
        "candidates": {"first_stages": ["bm25"], "depth": 12, "top_depth": 4, "top": 3, "middle": 1, "tail": 1},
        "teachers": {"bm25": {}, "student": {"type": "cross-encoder", "model": str(model), "batch_size": 16}},
        "train": {
            "model": str(model),
            "max_steps": 4,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "max_length": 64,
        },
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return values


def make_settings(tmp_path, model, **sections):
    return AdaptSettings.model_validate(make_values(tmp_path, model, **sections))


def data_of(run: Path):
    """Contents of the files that the stages before training have written."""
    return {path.name: path.read_bytes() for path in sorted((run / "data").iterdir())}


def manifest_of(run: Path):
    return json.loads((run / "manifest.json").read_text())


def lines_of(path: Path):
    """Values of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
