"""Measure a model before and after its adaptation: the only module here that reads relevance judgements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache import key_of
from ..checkpoints.mini import MINI_NAME
from ..evaluation.evaluate import FIRST_STAGE, evaluate_scores
from ..evaluation.first_stages import Candidates, answerable_queries, first_stage_candidates
from ..retrieval.collection import Collection, Source
from ..training.distillation import TEACHERS_FILE
from ..training.teacher_labels import Teachers
from .candidates import FusedFirstStage, make_first_stages
from .corpus import CorpusDocument
from .scoring import score_cache, score_with_teachers
from .settings import AdaptSettings
from .teachers import CrossEncoderTeacher, Teacher, make_teachers, pair_key

TEACHER, GENERAL, ADAPTED = "teacher", "general", "adapted"


def evaluate_adaptation(
    settings: AdaptSettings, source: str, others: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Measure first stage, calibrated teachers, and the model before and after, by nDCG@10 x 100.

    Args:
        settings: Settings of a run whose training has finished.
        source: Collection with relevance judgements, `FOLDER:SPLIT`.
        others: Folders of further models to measure, by name.

    Returns:
        `{"collection", "queries", "first_stage", "teacher", "general", "adapted", "p_value"}`, and the other models by
        name. The p-value is that of adapted against general.
    """
    split = Source.parse(source)
    collection = split.load()
    documents = {name: {"_id": name, **document} for name, document in collection.documents.items()}
    cache, run = settings.output_dir / "cache", settings.output_dir / "train"
    first_stages = make_first_stages(settings.candidates, documents, cache / "embeddings")
    fused = FusedFirstStage(list(first_stages.values()))
    candidates = first_stage_candidates(collection, fused, answerable_queries(collection), settings.evaluation_depth)

    teachers = make_teachers(settings.teachers, settings.candidates, first_stages, documents, cache / "embeddings")
    models = {GENERAL: settings.train.get("model", MINI_NAME), ADAPTED: run / "model", **(others or {})}
    options: dict[str, Any] = {"max_length": settings.evaluation_max_length, "dtype": settings.evaluation_dtype}
    students = {name: CrossEncoderTeacher(str(model), **options) for name, model in models.items()}
    # A teacher may have the name of a student.
    scorers: dict[str, Teacher] = {f"{TEACHER} {name}": teacher for name, teacher in teachers.items()}
    scores = cached_scores({**scorers, **students}, collection, documents, candidates, cache / "evaluation")

    calibrated = Teachers.load(run / TEACHERS_FILE)
    labels = {
        query: calibrated.labels({name: scores[f"{TEACHER} {name}"][query] for name in teachers})
        for query in candidates
    }
    systems = {TEACHER: labels} | {name: scores[name] for name in students}
    result = evaluate_scores(systems, collection, candidates, settings.seed)
    return {
        "collection": collection.name if split.split == "test" else f"{collection.name}:{split.split}",
        "queries": len(candidates),
        **{name: 100 * result.mean(name) for name in (FIRST_STAGE, *systems)},
        "p_value": result.p_value(ADAPTED, GENERAL),
    }


def cached_scores(
    scorers: Mapping[str, Teacher],
    collection: Collection,
    documents: Mapping[str, CorpusDocument],
    candidates: Candidates,
    folder: Path,
) -> dict[str, dict[str, list[float | None]]]:
    """Score candidates, unless the scores are in the cache.

    Args:
        scorers: Teachers and students by name; those of the same identity, such as a model that is both, score once.
        collection: Collection of the queries.
        documents: Its documents by id.
        candidates: Candidates of each query.
        folder: Folder of the caches.

    Returns:
        Scorer -> query id -> a score for each candidate; None where there is none.
    """
    pairs = {
        query: [(collection.queries[query], documents[document]) for document in hits]
        for query, hits in candidates.items()
    }
    # CacheIdentity -> the name under which its scores are cached.
    cache_names: dict[bytes, str] = {}
    for name, scorer in scorers.items():
        cache_names.setdefault(key_of(scorer.identity), name)
    all_pairs = [pair for pairs_of_query in pairs.values() for pair in pairs_of_query]
    score_with_teachers({name: scorers[name] for name in cache_names.values()}, all_pairs, folder)
    scores: dict[str, dict[str, list[float | None]]] = {}
    for name, scorer in scorers.items():
        cache = score_cache(folder, cache_names[key_of(scorer.identity)])
        scores[name] = {
            query: [cache.get(pair_key(scorer, pair)) for pair in pairs_of_query]
            for query, pairs_of_query in pairs.items()
        }
    return scores
