"""Rerank JSONL rows of {"query", "documents"} on a Ray cluster: actors hold the model, and rows flow through them.

python examples/rerank_with_ray.py rows.jsonl reranked.jsonl --model mini --workers 2

Needs `pip install "modeling-querit[ray]"`. Without a cluster, Ray starts one on this machine; with one, all machines
must be able to read the rows and the model. For clusters without Ray, `querit rerank --run rows.jsonl` under torchrun
does the same, and resumes after a kill.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import ray

from modeling_querit.checkpoints.loading import default_device, load_model
from modeling_querit.files import atomic_write

# Rows that an actor gets at once.
ROWS_PER_BATCH = 16


class Reranker:
    """An actor: loads the model once, then adds scores to rows, in the order of their documents.

    Args:
        model: "mini", a folder or a repository.
    """

    def __init__(self, model: str):
        self.model = load_model(model, device=default_device())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Score the rows of a batch of lines."""
        return {"text": [json.dumps(self.score(json.loads(line)), ensure_ascii=False) for line in batch["text"]]}

    def score(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add the scores of one row."""
        pairs = [(row["query"], document) for document in row["documents"]]
        return row | {"scores": self.model.predict(pairs, show_progress_bar=False).tolist()}


def main() -> None:
    """Rerank a file to another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSONL rows with a query and documents")
    parser.add_argument("output", type=Path, help="new file: the rows with scores, in the same order")
    parser.add_argument("--model", default="mini", help="mini, a folder or a repository")
    parser.add_argument("--workers", type=int, default=2, help="number of actors")
    # Ray reads rows in tasks of one CPU each: actors must not take all CPUs.
    parser.add_argument("--cpus", type=float, default=0.5, help="CPUs that Ray sets aside for each actor")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that it sets aside for each actor")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists: name a new file.")
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Lines, not tables: rows may have any further fields, and documents may be strings or objects.
    rows = ray.data.read_text(str(args.rows.resolve()))
    scored = rows.repartition(target_num_rows_per_block=ROWS_PER_BATCH).map_batches(
        Reranker,
        fn_constructor_args=(args.model,),
        batch_size=ROWS_PER_BATCH,
        num_cpus=args.cpus,
        num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
    )
    with atomic_write(args.output) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{row['text']}\n" for row in scored.iter_rows())
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
