"""An evaluator for the trainers of sentence-transformers."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from ..retrieval.collection import Collection
from ..retrieval.sampling import Retriever
from .evaluate import BEST_ORDER, FIRST_STAGE, MRR, NDCG, Candidates, Reranker, evaluate_scores, fused, score_candidates
from .first_stages import BM25_NAME, check_collection, find_candidates, first_stage_candidates, sample_queries
from .sources import find_collection

_MODEL = "model"


class RerankingEvaluator(BaseEvaluator):
    """Measures how a cross-encoder orders the candidates of a first stage, while it is trained.

    Candidates are found once; then every call scores them, as `modeling_querit.evaluate` does. Unlike
    `CrossEncoderRerankingEvaluator`, it takes graded judgements, counts relevant documents that the first stage has not
    found, and reports the first stage and the best order beside the model.

    Args:
        collection: Documents, queries and relevance judgements; or where they are: `FOLDER:SPLIT` or `ir_datasets:ID`.
        first_stage: Index over the collection's documents, or its name, as in `find_candidates`.
        candidates: Documents to put in order, in place of the first stage's.
        depth: Candidates per query for which the collection lists none.
        limit: Number of queries, drawn at random; all by default.
        seed: Seed of the draw.
        name: Name before the metrics, as in `scifact_ndcg_at_10`; by default the collection's.
        predict_options: Keyword arguments of the model's `predict`.
        write_csv: Whether each call adds a line to a CSV file in the trainer's output folder.

    Raises:
        ValueError: if the collection cannot be measured.

    Example:
        ```python
        >>> evaluator = RerankingEvaluator("data/scifact:dev", depth=20, limit=100)
        >>> trainer = CrossEncoderTrainer(model=model, evaluator=evaluator, ...)
        ```
    """

    def __init__(
        self,
        collection: Collection | str | os.PathLike[str],
        *,
        first_stage: Retriever | str = BM25_NAME,
        candidates: Candidates | None = None,
        depth: int = 100,
        limit: int | None = None,
        seed: int = 0,
        name: str | None = None,
        predict_options: dict[str, Any] | None = None,
        write_csv: bool = True,
    ):
        super().__init__()
        if not isinstance(collection, Collection):
            collection = find_collection(os.fspath(collection)).load()
        queries = sample_queries(collection, limit, seed) if candidates is None else list(candidates)
        check_collection(collection, queries)
        if candidates is None:
            candidates = (
                find_candidates(collection, first_stage, queries, depth)
                if isinstance(first_stage, str)
                else first_stage_candidates(collection, first_stage, queries, depth)
            )
        self.collection, self.candidates = collection, candidates
        self.name = collection.name if name is None else name
        self.predict_options = {"show_progress_bar": False, **(predict_options or {})}
        self.write_csv = write_csv
        self.primary_metric: str | None = NDCG

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure a model.

        Args:
            model: A `CrossEncoder`, a Querit reranker, or anything else with `predict`.
            output_path: Folder of the CSV file.
            epoch: Epoch, for the file and the model card.
            steps: Step in it.

        Returns:
            nDCG@10 and MRR@10 of the model and of its scores added to the first stage's, and nDCG@10 of the first stage
            and of the best order; all in [0, 1], under names that begin with that of the evaluator.
        """
        reranker: Reranker = model
        scores = score_candidates(reranker, self.collection, self.candidates, self.predict_options, False)
        result = evaluate_scores({_MODEL: scores}, self.collection, self.candidates)
        metrics = {
            NDCG: result.mean(_MODEL),
            MRR: result.mean(_MODEL, MRR),
            f"fused_{NDCG}": result.mean(fused(_MODEL)),
            f"first_stage_{NDCG}": result.mean(FIRST_STAGE),
            f"best_order_{NDCG}": result.mean(BEST_ORDER),
        }
        if output_path is not None and self.write_csv:
            self._write_line(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        if hasattr(model, "model_card_data"):
            self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says about this evaluator."""
        return {"queries": len(self.candidates), "pairs": sum(map(len, self.candidates.values()))}

    def _write_line(self, folder: Path, values: dict[str, float]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"reranking_{self.name.replace('/', '_')}_results.csv"
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(values))
            if is_new:
                writer.writeheader()
            writer.writerow(values)
