"""The way from one model to another along which nDCG is measured: which `t` to merge with."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation.comparison import Candidates, by_score, first_stage_candidates, judged_queries, measure
from ..evaluation.metrics import mean
from ..figures import new_figure, save_figure
from ..files import write_json
from ..modeling_querit import QueritForSequenceRanking
from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection
from .merge import RECORD_FILE, Recipe, open_models
from .streaming import checked_size
from .writing import check_new, room_beside, whole_folder

SEARCH_FILE, PLOT_FILE = "merge_search.json", "merge_search.png"
_GRID = (0.5, 0.0, 1.0, 0.25, 0.75)
# How far t rises and falls from its best value between the first layer and the last.
_TILT = 0.25
_TILTS = 2
FEWEST = len(_GRID)


@dataclass(frozen=True)
class Trial:
    """What one merge gave.

    Args:
        t: As in `Schedule.of_t`: one number, or one for the first layer and one for the last.
        figures: nDCG@10 by collection, in [0, 1].
    """

    t: str
    figures: dict[str, float]

    @property
    def mean(self) -> float:
        """Over collections."""
        return mean(self.figures)


@dataclass(frozen=True)
class Judged:
    """Queries with their first-stage candidates, to be ranked by every merge.

    Args:
        collection: Where they are from.
        candidates: Query id -> document ids with first-stage scores, best first.
        name: In tables.
    """

    collection: Collection
    candidates: Candidates

    name: str

    @classmethod
    def load(cls, source: str, queries: int, depth: int, seed: int = 0) -> Judged:
        """From `FOLDER:SPLIT` in the BEIR layout (split `dev` where none is named), BM25's best as candidates.

        Raises:
            FileNotFoundError: if a file of the layout is missing.
            ValueError: if no query has a relevant document.
        """
        if queries < 1 or depth < 1:
            raise ValueError(f"queries is {queries} and depth {depth}: nothing is ranked with less than 1 of each.")
        folder, _, split = source.partition(":")
        collection = Collection.load(folder, split or "dev")
        judged = judged_queries(collection)
        drawn = sorted(random.Random(seed).sample(judged, min(queries, len(judged))))
        candidates = first_stage_candidates(collection, BM25(collection.documents), drawn, depth)
        return cls(collection, candidates, f"{Path(folder).resolve().name}:{split or 'dev'}")

    def ndcg(self, model: QueritForSequenceRanking, max_length: int | None = None) -> float:
        """nDCG@10 of a model's rankings, in [0, 1]."""
        rankings = {}
        for query, hits in self.candidates.items():
            pairs = [(self.collection.queries[query], self.collection.documents[each]) for each in hits]
            scores = model.predict(pairs, max_length=max_length, show_progress_bar=False).tolist()
            rankings[query] = by_score(list(hits), scores)
        return mean(measure(self.collection, {"merged": rankings})["merged"])


def search_merge(
    recipe: Recipe,
    collections: Sequence[Judged],
    destination: str | Path,
    *,
    evaluations: int = 9,
    max_length: int | None = None,
    max_shard_size: int | str = "5GB",
    echo: Callable[[str], None] = print,
) -> list[Trial]:
    """Merge two models with the `t` that ranks best on judged collections.

    The ends, the middle and the quarters are tried first, then the middles beside the best so far, at last
    (`evaluations` permitting) a `t` that rises or falls through the layers. What is computed of the tensors, their
    angles, is computed once. Beside the merged model are the figures of all trials and their curve.

    What is chosen by a collection is too good on it: measure the result on another one.

    Args:
        recipe: Two models, `t` left open.
        collections: What to choose by.
        destination: A folder that does not exist yet, or is empty.
        evaluations: How many merges to try, 5 at least.
        max_length: Tokens a pair may have.
        max_shard_size: Bytes of one weight file.
        echo: Told of each trial.

    Returns:
        All trials, in the order in which they were made.

    Raises:
        OSError, ValueError: as `merge_checkpoints`; or if there are not two models, or too few evaluations.
    """
    if len(recipe.models) != 2 or recipe.t or recipe.weights:
        raise ValueError("--search finds the t of two models: name two, and neither t nor weights.")
    names = [judged.name for judged in collections]
    if not names or len(set(names)) < len(names):
        raise ValueError("A search needs collections, each with a name of its own.")
    if evaluations < FEWEST:
        raise ValueError(f"A search takes {FEWEST} evaluations at least, not {evaluations}.")
    destination = check_new(destination)
    trials: list[Trial] = []
    checked_size(max_shard_size)
    with whole_folder(destination) as folder:
        merger = open_models(recipe, room_beside(folder))
        best, trial_folder = folder / "best", folder / "trial"
        for t in _next_t(trials, evaluations):
            trial_folder.mkdir()
            merger.write(
                trial_folder,
                dataclasses.replace(recipe, t=[t]),
                destination.name,
                max_shard_size,
                show_progress_bar=False,
            )
            trial = Trial(t, _figures(trial_folder, collections, max_length))
            echo(f"t {t}: nDCG@10 {100 * trial.mean:.2f}")
            if all(trial.mean > other.mean for other in trials):
                shutil.rmtree(best, ignore_errors=True)
                trial_folder.rename(best)
            else:
                shutil.rmtree(trial_folder)
            trials.append(trial)
        if len({trial.mean for trial in trials}) == 1:
            echo("All rank alike: these collections tell nothing about t.")
        for path in list(best.iterdir()):
            path.rename(folder / path.name)
        best.rmdir()
        rows = [{"t": trial.t, "mean": 100 * trial.mean, **_percent(trial.figures)} for trial in trials]
        write_json({"recipe": RECORD_FILE, "unit": "nDCG@10 x 100", "trials": rows}, folder / SEARCH_FILE)
        _draw(trials, folder / PLOT_FILE)
    return trials


def _next_t(trials: Sequence[Trial], evaluations: int) -> Iterator[str]:
    """Values to try, each chosen by the trials that were made before it."""
    tilts = _TILTS if evaluations >= FEWEST + _TILTS else 0
    yield from map(str, _GRID)
    for _ in range(evaluations - FEWEST - tilts):
        yield str(_beside_the_best({float(trial.t): trial.mean for trial in trials}))
    if tilts:
        t = float(max(trials, key=lambda trial: trial.mean).t)
        low, high = max(0.0, t - _TILT), min(1.0, t + _TILT)
        yield from (f"{low:g}:{high:g}", f"{high:g}:{low:g}")


def _beside_the_best(means: Mapping[float, float]) -> float:
    """The middle between the best value and that neighbour which is further away; of equal ones the better."""
    tried = sorted(means)
    # Of equal ones the first that was tried, as it is the one that is kept.
    place = tried.index(max(means, key=lambda t: means[t]))
    neighbours = tried[max(0, place - 1) : place] + tried[place + 1 : place + 2]
    neighbour = max(neighbours, key=lambda t: (abs(t - tried[place]), means[t]))
    return (tried[place] + neighbour) / 2


def _figures(folder: Path, collections: Sequence[Judged], max_length: int | None) -> dict[str, float]:
    model = QueritForSequenceRanking.from_pretrained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {judged.name: judged.ndcg(model, max_length) for judged in collections}


def _percent(figures: Mapping[str, float]) -> dict[str, Any]:
    return {name: 100 * value for name, value in figures.items()}


def _draw(trials: Sequence[Trial], path: Path) -> None:
    figure = new_figure(7, 4)
    axes = figure.subplots()
    constant = sorted((trial for trial in trials if ":" not in trial.t), key=lambda trial: float(trial.t))
    places = [float(trial.t) for trial in constant]
    names = list(trials[0].figures)
    for name in names if len(names) > 1 else []:
        axes.plot(places, [100 * trial.figures[name] for trial in constant], alpha=0.5, linewidth=1, label=name)
    axes.plot(places, [100 * trial.mean for trial in constant], "k-o", label="mean" if len(names) > 1 else names[0])
    for trial in trials:
        if ":" in trial.t:
            axes.axhline(100 * trial.mean, linestyle="--", linewidth=1, color="gray", label=f"t {trial.t}")
    axes.set_xlabel("t: 0 is the first model, 1 the second")
    axes.set_title("nDCG@10 x 100 of the merged model", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
