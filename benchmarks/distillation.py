"""Distillation from teachers' scores alone: python -m benchmarks.distillation --data FOLDER:SPLIT

The queries of a collection are split. On one part, teachers score a first stage's candidates, and the student is
trained on these scores alone. On the held-out part, teachers and student rank the candidates, and nDCG@10 is measured.
Some of the held-out queries are also ranked after each epoch, for the plot; nothing is selected by it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling_querit.adaptation.candidates import make_first_stage
from modeling_querit.adaptation.corpus import CorpusDocument
from modeling_querit.adaptation.evaluate import cached_scores
from modeling_querit.adaptation.teachers import CrossEncoderTeacher, FirstStageTeacher, Teacher
from modeling_querit.checkpoints.mini import BASE_NAME
from modeling_querit.evaluation.evaluate import (
    BEST_ORDER,
    FIRST_STAGE,
    evaluate_scores,
)
from modeling_querit.evaluation.first_stages import answerable_queries, first_stage_candidates
from modeling_querit.files import write_json, write_jsonl
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Source
from modeling_querit.retrieval.sampling import Bands
from modeling_querit.training.data import Row
from modeling_querit.training.prepare import sample_documents
from modeling_querit.training.teacher_labels import Teachers
from modeling_querit.training.train import main as train

BM25_NAME = "bm25"
_BATCH_SIZE = 64
# Held-out queries that are ranked after each epoch.
_VALIDATION_QUERIES = 24


def make_teachers(args: argparse.Namespace, documents: Mapping[str, CorpusDocument]) -> dict[str, Teacher]:
    """Make the teachers: BM25, which also retrieves the candidates, and rerankers."""
    bm25: dict[str, Teacher] = {BM25_NAME: FirstStageTeacher(make_first_stage(BM25_NAME, documents))}
    return bm25 | {Path(name).name: reranker(name, args) for name in args.teacher}


def reranker(name: str | Path, args: argparse.Namespace) -> CrossEncoderTeacher:
    """Make a teacher of a reranker; its scores are cached on disk."""
    return CrossEncoderTeacher(str(name), max_length=args.max_length, batch_size=_BATCH_SIZE)


def sample_rows(rows: Sequence[Row], bands: Bands, seed: int) -> list[Row]:
    """Sample documents of each row."""
    return [sample_documents(row, bands, random.Random(f"{seed}/{row['source']}")) for row in rows]


def with_judgements(row: Row, grades: Mapping[str, int], documents: Sequence[str]) -> Row:
    """Return a row with relevance judgements in place of teacher scores."""
    best = max(grades.values())
    return {
        "query": row["query"],
        "documents": row["documents"],
        "labels": [grades.get(document, 0) / best for document in documents],
        "source": row["source"],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; unknown options are passed on to `querit train`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="collection in the BEIR layout, FOLDER:SPLIT")
    parser.add_argument("--student", default="mini", help="reranker to train, or gemma3-270m for a new one")
    parser.add_argument("--teacher", nargs="*", default=["mini"], help="rerankers as teachers, in addition to BM25")
    parser.add_argument("--weights", type=json.loads, help='teacher weights as JSON; by default {"bm25": 1, "mini": 1}')
    parser.add_argument("--queries", type=int, help="number of queries, drawn with the seed; by default all")
    parser.add_argument("--held-out", type=float, default=0.5, help="share of the queries that is not trained on")
    parser.add_argument("--depth", type=int, default=20, help="candidates per query for which none are listed")
    parser.add_argument("--documents", type=int, default=8, help="documents of a training row")
    parser.add_argument("--max-length", type=int, default=160, help="maximum tokens per query and document together")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of rows, model, plot and metrics")
    parser.add_argument("--seed", type=int, default=0)
    args, args.settings = parser.parse_known_args(arguments)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Score, train, measure, print a table, and write the metrics."""
    args = parse(arguments)
    collection = Source.parse(args.data).load()
    queries = answerable_queries(collection)
    random.Random(args.seed).shuffle(queries)
    queries = queries[: args.queries]
    held_out = queries[: round(args.held_out * len(queries))]
    candidates = first_stage_candidates(collection, BM25(collection.documents), queries, args.depth)
    documents = {name: {"_id": name, **document} for name, document in collection.documents.items()}
    teachers, cache_folder = make_teachers(args, documents), args.output_dir / "cache"
    scores = cached_scores(teachers, collection, documents, candidates, cache_folder)
    rows = {
        query: {
            "query": collection.queries[query],
            "documents": [collection.documents[document] for document in hits],
            "scores": {name: scores[name][query] for name in teachers},
            "source": query,
        }
        for query, hits in candidates.items()
    }

    train_rows = [rows[query] for query in queries[len(held_out) :]]
    validation_rows = [
        with_judgements(rows[query], collection.qrels[query], candidates[query])
        for query in held_out[:_VALIDATION_QUERIES]
    ]
    write_jsonl(validation_rows, args.output_dir / "held_out.jsonl")
    third = args.documents // 3
    bands = Bands(top=args.documents - 2 * third, middle=third, random=third, top_depth=5, depth=12)
    write_jsonl(sample_rows(train_rows, bands, args.seed), args.output_dir / "taught.jsonl")
    weights = args.weights or dict.fromkeys([BM25_NAME, *teachers], 1.0)
    settings = ["--model", args.student, "--train", str(args.output_dir / "taught.jsonl")]
    settings += ["--teacher_weights", json.dumps(weights), "--max_length", str(args.max_length)]
    settings += ["--output_dir", str(args.output_dir), "--seed", str(args.seed), "--resume", "True"]
    settings += ["--validation", str(args.output_dir / "held_out.jsonl"), "--eval_strategy", "epoch"]
    settings += ["--per_device_eval_batch_size", "2"]
    train([*settings, *args.settings])

    calibrated = Teachers.load(args.output_dir / "teachers.json")
    students = {"student": reranker(args.output_dir / "model", args)}
    if args.student != BASE_NAME:
        students["student before"] = reranker(args.student, args)
    held_out_candidates = {query: candidates[query] for query in held_out}
    # With the teachers, so that a student that was one of them is not scored twice.
    scores = cached_scores(teachers | students, collection, documents, held_out_candidates, cache_folder)
    labels = {query: calibrated.labels(rows[query]["scores"]) for query in held_out_candidates}
    result = evaluate_scores(
        {"teacher": labels} | {name: scores[name] for name in students}, collection, held_out_candidates
    )
    columns = {BM25_NAME: FIRST_STAGE, "teacher": "teacher", "oracle order": BEST_ORDER} | {
        name: name for name in students
    }
    metrics = {column: result.mean(system) for column, system in columns.items()}
    report(metrics, args, len(held_out), len(train_rows))


def report(metrics: dict[str, float], args: argparse.Namespace, held_out: int, taught: int) -> None:
    """Print the metrics as a table, and write them."""
    table = Table("ranking", "nDCG@10 x 100", "of the teacher", title=f"{args.data}: {held_out} held-out queries")
    for name, value in metrics.items():
        table.add_row(name, f"{100 * value:.1f}", f"{value / metrics['teacher']:.0%}")
    Console(width=100).print(table)
    row = {
        "collection": args.data,
        "held_out": held_out,
        "taught": taught,
        "ratio": metrics["student"] / metrics["teacher"],
    }
    rows = [row | {name: 100 * value for name, value in metrics.items()}]
    write_json({"rows": rows, "settings": vars(args)}, args.output_dir / "distillation.json")


if __name__ == "__main__":
    main()
