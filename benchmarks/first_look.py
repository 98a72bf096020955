"""nDCG@10 of a reranker on human judgements: python -m benchmarks.first_look [--model mini] [--data DIR] [--int8]

A query's candidates are those that the collection lists for it, or else BM25's best. Columns: a random order (its
expected value), BM25's order, the reranker's, the sum of both scores (each scaled to [0, 1] within the query), and the
oracle order, the best that the candidates allow. With --int8, the reranker is measured in int8 as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling_querit.checkpoints.loading import load_model
from modeling_querit.environment import environment
from modeling_querit.evaluation.evaluate import (
    BEST_ORDER,
    FIRST_STAGE,
    RANDOM,
    evaluate,
    fused,
)
from modeling_querit.evaluation.first_stages import first_stage_candidates, sample_queries
from modeling_querit.files import write_json
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Collection, Source

RERANKED, RERANKED_INT8 = "BM25 + mini", "the same in int8"


def load_collections(data: Path) -> dict[str, Collection]:
    """Load four collections with human judgements, and XQuAD with German questions on English documents."""
    collections = {
        name: Source(data / "targets" / name, "test").load() for name in ("scifact", "cranfield", "cacm", "liveqa_med")
    }
    english, german = (Source(data / "multilingual" / name, "test").load() for name in ("xquad-en", "xquad-de"))
    # Question and paragraph ids are the same in every language.
    collections["xquad de->en"] = Collection("xquad de->en", english.documents, german.queries, english.qrels)
    return collections


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="mini, or a folder or repository")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--queries", type=int, default=25, help="queries per collection, drawn with seed 0 (0: all)")
    parser.add_argument("--depth", type=int, default=20, help="candidates per query for which none are listed")
    parser.add_argument("--max-length", type=int, default=320, help="maximum tokens per query and document together")
    parser.add_argument("--int8", action="store_true", help="measure the model in int8 too (needs torchao)")
    parser.add_argument("--json", type=Path, help="file to write the metrics to")
    args = parser.parse_args(arguments)
    if not args.data.is_dir():
        sys.exit(f"{args.data} is not a folder: name one with targets/ and multilingual/ in the BEIR layout by --data.")
    models = {RERANKED: load_model(args.model)} | (
        {RERANKED_INT8: load_model(args.model, int8=True)} if args.int8 else {}
    )
    systems = {"random": RANDOM, "BM25": FIRST_STAGE, **{name: name for name in models}}
    systems |= {"score fusion (sum)": fused(RERANKED), "oracle order": BEST_ORDER}
    table = Table("collection", "queries", "pairs", *systems, "pairs/s", title="nDCG@10 x 100")
    options = {"max_length": args.max_length, "show_progress_bar": False}
    rows = []
    for name, collection in load_collections(args.data).items():
        queries = sample_queries(collection, args.queries or None)
        candidates = first_stage_candidates(collection, BM25(collection.documents), queries, args.depth)
        start = time.perf_counter()
        result = evaluate(models, collection, candidates=candidates, predict_options=options)
        speed = len(models) * result.pairs / (time.perf_counter() - start)
        metrics = {column: result.mean(system) for column, system in systems.items()}
        counts = {"queries": len(result.candidates), "pairs": result.pairs}
        rows.append({"collection": name, **counts, "pairs_per_second": speed, **metrics})
        cells = [f"{100 * value:.1f}" for value in metrics.values()]
        table.add_row(name, *map(str, counts.values()), *cells, f"{speed:.1f}")
    Console(width=120).print(table)
    if args.json:
        # Without paths, which mean nothing on another machine.
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        write_json({"settings": settings, "rows": rows, **environment()}, args.json)


if __name__ == "__main__":
    main()
