"""How good the model is, before and after, on judged collections: the only place where judgements are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.comparison import Candidates, by_score, first_stage_candidates, judged_queries, measure, p_value
from ..evaluation.metrics import mean
from ..retrieval.collection import Collection
from ..training.calibration import Teachers
from ..training.distillation import TEACHERS_FILE
from .building import make_first_stages, make_teachers
from .candidates import Fused
from .corpus import Document
from .scoring import kept_scores, score_pairs
from .settings import AdaptSettings
from .shards import key_of
from .teachers import CrossEncoderTeacher, Teacher, pair_key

GENERAL, ADAPTED = "general", "adapted"


def evaluate(settings: AdaptSettings, source: str, others: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """nDCG@10 x 100 on a judged collection: of the first stage, the teachers together, the model before and after.

    Args:
        settings: Of the run, whose training has ended.
        source: `FOLDER:SPLIT` in the BEIR layout.
        others: More models to measure, folders by name.

    Returns:
        `{"collection", "queries", "first_stage", "teacher", "general", "adapted", "p_value"}` and the others by name;
        the p-value is that of adapted against general.
    """
    folder, _, split = source.partition(":")
    collection = Collection.load(folder, split or "test")
    documents = {name: {"_id": name, **each} for name, each in collection.documents.items()}
    kept, run = settings.output_dir / "cache", settings.output_dir / "train"
    first_stages = make_first_stages(settings.candidates, documents, kept / "embeddings")
    queries = judged_queries(collection)
    stage = Fused(list(first_stages.values()))
    candidates = first_stage_candidates(collection, stage, queries, settings.evaluation_depth)

    teachers = make_teachers(settings.teachers, settings.candidates, first_stages, documents, kept / "embeddings")
    models = {GENERAL: settings.train.get("model", "mini"), ADAPTED: run / "model", **(others or {})}
    reads = {"max_length": settings.evaluation_max_length, "dtype": settings.evaluation_dtype}
    students = {name: CrossEncoderTeacher(str(model), **reads) for name, model in models.items()}
    scorers = {_as_teacher(name): teacher for name, teacher in teachers.items()} | students
    scores = scores_of(scorers, collection, documents, candidates, kept / "evaluation")

    calibrated = Teachers.load(run / TEACHERS_FILE)
    rankings: dict[str, dict[str, list[str]]] = {name: {} for name in ("first_stage", "teacher", *students)}
    for query, hits in candidates.items():
        found = list(hits)
        labels = calibrated.labels({name: scores[_as_teacher(name)][query] for name in teachers})
        rankings["first_stage"][query] = found
        rankings["teacher"][query] = by_score(found, _known(labels))
        for name in students:
            rankings[name][query] = by_score(found, _known(scores[name][query]))
    figures = measure(collection, rankings)
    return {
        "collection": collection.name if split in ("", "test") else f"{collection.name}:{split}",
        "queries": len(queries),
        **{name: 100 * mean(each) for name, each in figures.items()},
        "p_value": p_value(figures[ADAPTED], figures[GENERAL], settings.seed),
    }


def _as_teacher(name: str) -> str:
    """A teacher may have the name of a student."""
    return f"teacher {name}"


def _known(scores: list[float | None]) -> list[float]:
    """What could not be scored comes last."""
    return [-math.inf if score is None or math.isnan(score) else score for score in scores]


def scores_of(
    scorers: Mapping[str, Teacher],
    collection: Collection,
    documents: Mapping[str, Document],
    candidates: Candidates,
    folder: Path,
) -> dict[str, dict[str, list[float | None]]]:
    """Scorer -> query id -> a score for each candidate; scorers of one identity, such as a model that is teacher and
    student, are asked once."""
    pairs = {
        query: [(collection.queries[query], documents[each]) for each in hits] for query, hits in candidates.items()
    }
    asked: dict[bytes, str] = {}
    for name, scorer in scorers.items():
        asked.setdefault(key_of(scorer.identity), name)
    every = [pair for each in pairs.values() for pair in each]
    score_pairs({name: scorers[name] for name in asked.values()}, every, folder)
    found: dict[str, dict[str, list[float | None]]] = {}
    for name, scorer in scorers.items():
        kept = kept_scores(folder, asked[key_of(scorer.identity)])
        found[name] = {query: [kept.get(pair_key(scorer, pair)) for pair in each] for query, each in pairs.items()}
    return found
