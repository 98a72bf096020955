"""A student that sees nothing but its teachers' scores: python -m benchmarks.distillation --data FOLDER:SPLIT

The queries of a judged collection are split. On one part, teachers score a first stage's candidates, and the student is
trained on these scores alone; on the other, both rank the candidates of queries that the student has not seen, and the
judgements tell how well. Some of these are ranked after each epoch, too, for the curve; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling_querit.adaptation.candidates import FirstStage
from modeling_querit.adaptation.corpus import Document
from modeling_querit.adaptation.measuring import scores_of
from modeling_querit.adaptation.teachers import CrossEncoderTeacher, FirstStageTeacher, Teacher
from modeling_querit.checkpoints.mini import BASE_NAME
from modeling_querit.evaluation.comparison import by_score, first_stage_candidates, judged_queries, measure
from modeling_querit.evaluation.metrics import mean
from modeling_querit.files import write_json, write_jsonl
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Collection
from modeling_querit.training.calibration import Teachers
from modeling_querit.training.mining import Bands
from modeling_querit.training.rows import Row
from modeling_querit.training.run import main as train
from modeling_querit.training.sources import sample_documents

BM25_NAME = "bm25"
_DOCUMENTS_AT_ONCE = 64
# Held-out queries that are ranked after each epoch.
_CURVE = 24


def make_teachers(args: argparse.Namespace, documents: Mapping[str, Document]) -> dict[str, Teacher]:
    """BM25, which finds the candidates, and rerankers."""
    found: dict[str, Teacher] = {BM25_NAME: FirstStageTeacher(FirstStage(BM25_NAME, documents))}
    return found | {Path(name).name: reranker(name, args) for name in args.teacher}


def reranker(name: str | Path, args: argparse.Namespace) -> CrossEncoderTeacher:
    """One whose scores are kept on disk."""
    return CrossEncoderTeacher(str(name), max_length=args.max_length, batch_size=_DOCUMENTS_AT_ONCE)


def drawn(rows: Sequence[Row], bands: Bands, seed: int) -> list[Row]:
    """The rows with some of their documents."""
    return [sample_documents(row, bands, random.Random(f"{seed}/{row['source']}")) for row in rows]


def labelled(row: Row, grades: Mapping[str, int], documents: Sequence[str]) -> Row:
    """The row with judgements in the place of scores."""
    best = max(grades.values())
    return {
        "query": row["query"],
        "documents": row["documents"],
        "labels": [grades.get(document, 0) / best for document in documents],
        "source": row["source"],
    }


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
    parser.add_argument("--queries", type=int, help="of the collection, drawn with the seed; all by default")
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
    queries = queries[: args.queries]
    held_out = queries[: round(args.held_out * len(queries))]
    candidates = first_stage_candidates(collection, BM25(collection.documents), queries, args.depth)
    documents = {name: {"_id": name, **each} for name, each in collection.documents.items()}
    teachers, kept = make_teachers(args, documents), args.output_dir / "cache"
    scores = scores_of(teachers, collection, documents, candidates, kept)
    rows = {
        query: {
            "query": collection.queries[query],
            "documents": [collection.documents[document] for document in hits],
            "scores": {name: scores[name][query] for name in teachers},
            "source": query,
        }
        for query, hits in candidates.items()
    }

    taught = [rows[query] for query in queries[len(held_out) :]]
    curve = [labelled(rows[query], collection.qrels[query], candidates[query]) for query in held_out[:_CURVE]]
    write_jsonl(curve, args.output_dir / "held_out.jsonl")
    third = args.documents // 3
    bands = Bands(top=args.documents - 2 * third, middle=third, random=third, top_depth=5, depth=12)
    write_jsonl(drawn(taught, bands, args.seed), args.output_dir / "taught.jsonl")
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
    unseen = {query: candidates[query] for query in held_out}
    # Teachers too: a student that was one of them is not asked again.
    scores = scores_of(teachers | students, collection, documents, unseen, kept)
    rankings: dict[str, dict[str, list[str]]] = {
        BM25_NAME: {query: list(hits) for query, hits in unseen.items()},
        "teacher": {query: by_score(list(unseen[query]), calibrated.labels(rows[query]["scores"])) for query in unseen},
        "best order": {
            query: by_score(list(hits), [collection.qrels[query].get(document, 0) for document in hits])
            for query, hits in unseen.items()
        },
    }
    for name in students:
        rankings[name] = {query: by_score(list(unseen[query]), values) for query, values in scores[name].items()}
    figures = {name: mean(each) for name, each in measure(collection, rankings).items()}
    report(figures, args, len(held_out), len(taught))


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
    rows = [row | {name: 100 * value for name, value in figures.items()}]
    write_json({"rows": rows, "settings": vars(args)}, args.output_dir / "distillation.json")


if __name__ == "__main__":
    main()
