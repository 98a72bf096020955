"""A student that sees nothing but its teachers' scores: python -m benchmarks.distillation --data FOLDER:SPLIT

The queries of a judged collection are split. On one part, teachers score a first stage's candidates, and the student is
trained on these scores alone; on the other, both rank the candidates of queries that the student has not seen, and the
judgements tell how well. Nothing is judged before that.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modeling_querit.checkpoints.loading import load_model
from modeling_querit.evaluation.comparison import Candidates, by_score, first_stage_candidates, judged_queries
from modeling_querit.evaluation.metrics import mean, ndcg
from modeling_querit.files import write_jsonl
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Collection
from modeling_querit.training.calibration import Teachers
from modeling_querit.training.mining import Bands
from modeling_querit.training.rows import Row
from modeling_querit.training.run import main as train
from modeling_querit.training.sources import sample_documents

BM25_NAME = "bm25"


def teach(collection: Collection, candidates: Candidates, teachers: Mapping[str, Any], max_length: int) -> list[Row]:
    """Rows with the scores of BM25, which found the candidates, and of rerankers."""
    rows = []
    for number, (query, hits) in enumerate(candidates.items(), start=1):
        print(f"\rTeachers: {number} of {len(candidates)} queries ", end="", file=sys.stderr, flush=True)
        documents = [collection.documents[document] for document in hits]
        pairs = [(collection.queries[query], document) for document in documents]
        scores = {BM25_NAME: list(hits.values())} | {
            name: model.predict(pairs, max_length=max_length, show_progress_bar=False).tolist()
            for name, model in teachers.items()
        }
        rows.append({"query": collection.queries[query], "documents": documents, "scores": scores, "source": query})
    print(file=sys.stderr)
    return rows


def drawn(rows: Sequence[Row], bands: Bands, seed: int) -> list[Row]:
    """The rows with some of their documents."""
    return [sample_documents(row, bands, random.Random(f"{seed}/{row['source']}")) for row in rows]


def judge(collection: Collection, rankings: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, float]:
    """nDCG@10 of each ranking."""
    return {name: mean(ndcg(collection.qrels, ranking)) for name, ranking in rankings.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line; what is left over goes to `querit train`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a collection in the BEIR layout, FOLDER:SPLIT")
    parser.add_argument(
        "--student", default="mini", help="what is trained: a reranker, or 'gemma3-270m' from the start"
    )
    parser.add_argument("--teacher", nargs="*", default=["mini"], help="rerankers that teach, beside BM25")
    parser.add_argument(
        "--weights", type=json.loads, help='of the teachers, as JSON; {"bm25": 1, "mini": 1} by default'
    )
    parser.add_argument("--held-out", type=float, default=0.5, help="share of the queries that nobody is taught")
    parser.add_argument("--depth", type=int, default=20, help="candidates a query, where the collection lists none")
    parser.add_argument("--documents", type=int, default=8, help="of them in a training row")
    parser.add_argument("--max-length", type=int, default=160, help="tokens a pair may have")
    parser.add_argument("--output-dir", type=Path, required=True, help="for rows, model, plot and figures")
    parser.add_argument("--seed", type=int, default=0)
    args, args.settings = parser.parse_known_args(arguments)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Teach, train, judge, print."""
    args = parse(arguments)
    folder, _, split = args.data.partition(":")
    collection = Collection.load(folder, split or "test")
    queries = judged_queries(collection)
    random.Random(args.seed).shuffle(queries)
    held_out = queries[: round(args.held_out * len(queries))]
    candidates = first_stage_candidates(collection, BM25(collection.documents), queries, args.depth)
    teachers = {Path(name).name: load_model(name) for name in args.teacher}
    rows = {row["source"]: row for row in teach(collection, candidates, teachers, args.max_length)}

    taught = [rows[query] for query in queries[len(held_out) :]]
    third = args.documents // 3
    bands = Bands(top=args.documents - 2 * third, middle=third, random=third, top_depth=5, depth=12)
    write_jsonl(drawn(taught, bands, args.seed), args.output_dir / "taught.jsonl")
    weights = args.weights or dict.fromkeys([BM25_NAME, *teachers], 1.0)
    settings = ["--model", args.student, "--train", str(args.output_dir / "taught.jsonl")]
    settings += ["--teacher_weights", json.dumps(weights), "--max_length", str(args.max_length)]
    train([*settings, "--output_dir", str(args.output_dir), "--seed", str(args.seed), *args.settings])

    calibrated = Teachers.load(args.output_dir / "teachers.json")
    students = {"student before": load_model(args.student) if args.student == "mini" else None}
    students["student"] = load_model(args.output_dir / "model")
    rankings: dict[str, dict[str, list[str]]] = {BM25_NAME: {}, "teacher": {}, "best order": {}}
    rankings |= {name: {} for name, model in students.items() if model is not None}
    for query in held_out:
        documents, row = list(candidates[query]), rows[query]
        rankings[BM25_NAME][query] = documents
        rankings["teacher"][query] = by_score(documents, calibrated.labels(row["scores"]))
        grades = collection.qrels[query]
        rankings["best order"][query] = by_score(documents, [grades.get(document, 0) for document in documents])
        pairs = [(row["query"], document) for document in row["documents"]]
        for name, model in students.items():
            if model is not None:
                scores = model.predict(pairs, max_length=args.max_length, show_progress_bar=False).tolist()
                rankings[name][query] = by_score(documents, scores)
    report(judge(collection, rankings), args, len(held_out), len(taught))


def report(figures: dict[str, float], args: argparse.Namespace, held_out: int, taught: int) -> None:
    """Print the figures, and write them down."""
    table = Table("ranking", "nDCG@10 x 100", "of the teacher", title=f"{args.data}: {held_out} held-out queries")
    for name, value in figures.items():
        table.add_row(name, f"{100 * value:.1f}", f"{value / figures['teacher']:.0%}")
    Console(width=100).print(table)
    row = {
        "collection": args.data,
        "held_out": held_out,
        "taught": taught,
        "ratio": figures["student"] / figures["teacher"],
    }
    found = {"rows": [row | {name: 100 * value for name, value in figures.items()}], "settings": vars(args)}
    (args.output_dir / "distillation.json").write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
