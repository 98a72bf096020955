"""nDCG@10 of a reranker on human judgements: python -m benchmarks.first_look [--model mini] [--data DIR] [--int8]

Each query's candidates are what the collection lists for it, or else BM25's best; they are then put at random (the
mean of 20 shuffles), in BM25's order, in the reranker's, and by the sum of both scores, each scaled to [0, 1]. The last
column is what the best order of the same candidates would get. With --int8, the reranker is tried in int8 as well.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling_querit.checkpoints.loading import load_model
from modeling_querit.environment import environment
from modeling_querit.evaluation.comparison import Candidates, by_score, first_stage_candidates, judged_queries
from modeling_querit.evaluation.metrics import mean, ndcg
from modeling_querit.files import write_json
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Collection

RERANKED, RERANKED_INT8 = "BM25 + mini", "the same in int8"
SHUFFLES = 20


def load_collections(data: Path) -> dict[str, Collection]:
    """The four judged collections, and XQuAD with German questions on English documents."""
    collections = {
        name: Collection.load(data / "targets" / name, "test")
        for name in ("scifact", "cranfield", "cacm", "liveqa_med")
    }
    english = Collection.load(data / "multilingual" / "xquad-en", "test")
    german = Collection.load(data / "multilingual" / "xquad-de", "test")
    # Question and paragraph ids are the same in every language.
    collections["xquad de->en"] = Collection("xquad de->en", english.documents, german.queries, english.qrels)
    return collections


def compare(collection: Collection, candidates: Candidates, models: dict, max_length: int) -> dict[str, float]:
    """nDCG@10 by column, one of them for each of the models."""
    rng = random.Random(0)
    shuffles: list[dict[str, list[str]]] = [{} for _ in range(SHUFFLES)]
    lists: dict[str, dict[str, list[str]]] = {name: {} for name in ("BM25", *models, "sum of both", "best order")}
    for done, (query, hits) in enumerate(candidates.items(), start=1):
        print(f"\r{collection.name}: {done} of {len(candidates)} queries ", end="", file=sys.stderr, flush=True)
        documents = list(hits)
        pairs = [(collection.queries[query], collection.documents[document]) for document in documents]
        scores = {
            name: model.predict(pairs, max_length=max_length, show_progress_bar=False).tolist()
            for name, model in models.items()
        }
        both = _scaled(list(hits.values())), _scaled(scores[RERANKED])
        added = [one + other for one, other in zip(*both, strict=True)]
        grades = collection.qrels[query]
        for shuffle in shuffles:
            shuffle[query] = rng.sample(documents, len(documents))
        lists["BM25"][query] = documents
        for name in models:
            lists[name][query] = by_score(documents, scores[name])
        lists["sum of both"][query] = by_score(documents, added)
        lists["best order"][query] = by_score(documents, [grades.get(document, 0) for document in documents])
    print(file=sys.stderr)
    by_chance = [mean(ndcg(collection.qrels, shuffle)) for shuffle in shuffles]
    return {"random": sum(by_chance) / SHUFFLES} | {name: mean(ndcg(collection.qrels, lists[name])) for name in lists}


def _scaled(scores: list[float]) -> list[float]:
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="'mini', or a folder or repository")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--queries", type=int, default=25, help="queries a collection, drawn with seed 0 (0: all)")
    parser.add_argument("--depth", type=int, default=20, help="candidates a query, where the collection lists none")
    parser.add_argument("--max-length", type=int, default=320, help="tokens a pair may have")
    parser.add_argument("--int8", action="store_true", help="try the model in int8 as well (needs torchao)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    if not args.data.is_dir():
        sys.exit(
            f"{args.data} is no folder: name one that holds targets/ and multilingual/ in the BEIR layout with --data."
        )
    models = {RERANKED: load_model(args.model)} | (
        {RERANKED_INT8: load_model(args.model, int8=True)} if args.int8 else {}
    )
    columns = ["random", "BM25", *models, "sum of both", "best order"]
    table = Table("collection", "queries", "pairs", *columns, "pairs/s", title="nDCG@10 x 100")
    rows = []
    for name, collection in load_collections(args.data).items():
        relevant = judged_queries(collection)
        queries = random.Random(0).sample(relevant, min(args.queries or len(relevant), len(relevant)))
        candidates = first_stage_candidates(collection, BM25(collection.documents), queries, args.depth)
        start = time.perf_counter()
        figures = compare(collection, candidates, models, args.max_length)
        pairs = sum(map(len, candidates.values()))
        speed = len(models) * pairs / (time.perf_counter() - start)
        rows.append({"collection": name, "queries": len(queries), "pairs": pairs, "pairs_per_second": speed} | figures)
        cells = [f"{100 * figures[column]:.1f}" for column in columns]
        table.add_row(name, str(len(queries)), str(pairs), *cells, f"{speed:.1f}")
    Console(width=120).print(table)
    if args.json:
        # Settings, not places: the figures are for others too.
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        write_json({"settings": settings, "rows": rows, **environment()}, args.json)


if __name__ == "__main__":
    main()
