"""Search for the `t` of a merge: the position between two models at which nDCG@10 is highest."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.loading import default_device, load_model
from ..checkpoints.safetensors_io import parse_shard_size
from ..evaluation.evaluate import evaluate
from ..evaluation.first_stages import Candidates, first_stage_candidates, sample_queries
from ..evaluation.metrics import mean
from ..files import atomic_folder, check_destination, scratch_folder, write_json
from ..plotting import new_plot, save_plot
from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection, Source
from .merge import open_merger
from .recipe import RECORD_FILE, Recipe

SEARCH_FILE, PLOT_FILE = "merge_search.json", "merge_search.png"
# Tried first, in this order.
_GRID = ("0.5", "0.0", "1.0", "0.25", "0.75")
# Tried last: gradients of this slope, rising and falling through the layers, around the best constant.
_TILT = 0.25
_TILTS = 2
MIN_EVALUATIONS = len(_GRID)

# Measures the merged model in a folder: nDCG@10 in [0, 1], by the name of the collection.
Measure = Callable[[Path], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """One merge of a search.

    Args:
        t: Position between the models, as in `Schedule.from_t`: a constant, or a gradient from first to last layer.
        metrics: Collection -> nDCG@10, in [0, 1].
    """

    t: str
    metrics: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean nDCG@10 over collections."""
        return mean(self.metrics)


@dataclass(frozen=True)
class ValidationSet:
    """Queries with relevance judgements, and their first-stage candidates, which every merge reranks.

    Args:
        name: Name of the collection and its split, `NAME:SPLIT`.
        collection: Collection of the queries.
        candidates: Query id -> document ids with first-stage scores, best first.
    """

    name: str
    collection: Collection
    candidates: Candidates

    @classmethod
    def load(cls, source: str, queries: int, depth: int, seed: int = 0) -> ValidationSet:
        """Draw queries of a collection, with BM25's best documents as candidates, or those that the collection lists.

        Args:
            source: Folder in the BEIR layout and split, `FOLDER:SPLIT`; the split is `dev` by default.
            queries: Maximum number of queries.
            depth: Number of candidates per query.
            seed: Seed of the draw.

        Raises:
            FileNotFoundError: if a file of the layout is missing.
            ValueError: if no query has a relevant document, or `queries` or `depth` is below 1.
        """
        split = Source.parse(source, default_split="dev")
        collection = split.load()
        drawn_queries = sample_queries(collection, queries, seed)
        candidates = first_stage_candidates(collection, BM25(collection.documents), drawn_queries, depth)
        return cls(f"{split.name}:{split.split}", collection, candidates)


def load_validation_sets(sources: Sequence[str], queries: int = 50, depth: int = 20) -> list[ValidationSet]:
    """Load several validation sets, as `ValidationSet.load` does.

    Raises:
        ValueError: if two of them have the same name.
    """
    validation_sets = [ValidationSet.load(source, queries, depth) for source in sources]
    counts = Counter(validation_set.name for validation_set in validation_sets)
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"There are two collections called {duplicates[0]}: rename the folder of one of them.")
    return validation_sets


def measure_ndcg(
    folder: Path, validation_sets: Sequence[ValidationSet], max_length: int | None = None
) -> dict[str, float]:
    """Measure a reranker on validation sets.

    Args:
        folder: Folder of the reranker.
        validation_sets: Queries and candidates.
        max_length: Maximum length of a pair in tokens; by default the model's.

    Returns:
        Name of the validation set -> nDCG@10, in [0, 1].
    """
    model = load_model(folder).to(default_device())  # type: ignore[arg-type]
    options = {"max_length": max_length, "show_progress_bar": False}
    return {
        validation_set.name: evaluate(
            {"merged": model},
            validation_set.collection,
            candidates=validation_set.candidates,
            predict_options=options,
            show_progress_bar=False,
        ).mean("merged")
        for validation_set in validation_sets
    }


def search_merge(
    recipe: Recipe,
    measure: Measure,
    destination: str | Path,
    *,
    evaluations: int = 9,
    max_shard_size: int | str = "5GB",
    echo: Callable[[str], None] = print,
) -> list[Trial]:
    """Merge two models with the `t` that ranks best.

    The ends, the middle and the quarters are tried first, then midpoints beside the best `t` so far, and finally
    (`evaluations` permitting) gradients that rise or fall through the layers. Gram matrices are computed only once.
    Beside the merged model, the folder holds the metrics of all trials and a plot of them.

    The metrics of the chosen merge are optimistic on the collections it was chosen on: measure it on others.

    Args:
        recipe: Recipe of two models, without `t`.
        measure: Function that measures a merged model, such as `measure_ndcg`.
        destination: Folder that does not exist yet, or is empty.
        evaluations: Number of merges to try, at least `MIN_EVALUATIONS`.
        max_shard_size: Maximum size of a weight file in bytes, or a text such as "5GB".
        echo: Function that prints a line, called after each trial.

    Returns:
        All trials, in the order in which they were made.

    Raises:
        OSError, ValueError: as in `merge_checkpoints`; or if there are not two models, or too few evaluations.

    Example:
        ```python
        >>> validation_sets = load_validation_sets(["data/law:dev"])
        >>> search_merge(Recipe(["law", "medicine"]), partial(measure_ndcg, validation_sets=validation_sets), "merged")
        ```
    """
    if len(recipe.models) != 2 or recipe.t or recipe.weights:
        raise ValueError("--search finds the t of two models: name two, and neither t nor weights.")
    if evaluations < MIN_EVALUATIONS:
        raise ValueError(f"A search takes at least {MIN_EVALUATIONS} evaluations, not {evaluations}.")
    destination = check_destination(destination)
    parse_shard_size(max_shard_size)
    trials: list[Trial] = []
    with atomic_folder(destination) as folder:
        merger = open_merger(recipe, scratch_folder(folder))
        # In a folder of the destination's name, which goes into the card.
        best_folder, trial_folder = folder / "best", folder / "trial" / destination.name
        while (t := next_t(trials, evaluations)) is not None:
            trial_folder.mkdir(parents=True)
            merger.write(trial_folder, dataclasses.replace(recipe, t=[t]), max_shard_size, show_progress_bar=False)
            trial = Trial(t, measure(trial_folder))
            echo(f"t {t}: nDCG@10 {100 * trial.mean:.2f}")
            if all(trial.mean > other.mean for other in trials):
                shutil.rmtree(best_folder, ignore_errors=True)
                trial_folder.rename(best_folder)
            shutil.rmtree(trial_folder.parent)
            trials.append(trial)
        if len({trial.mean for trial in trials}) == 1:
            echo("All merges rank alike: these collections do not tell which t is best.")
        for path in list(best_folder.iterdir()):
            path.rename(folder / path.name)
        best_folder.rmdir()
        rows = [{"t": trial.t, "mean": 100 * trial.mean, **_percent(trial.metrics)} for trial in trials]
        write_json({"recipe": RECORD_FILE, "unit": "nDCG@10 x 100", "trials": rows}, folder / SEARCH_FILE)
        _plot(trials, folder / PLOT_FILE)
    return trials


def next_t(trials: Sequence[Trial], evaluations: int) -> str | None:
    """Choose the next `t` to try; None when the search is over.

    Args:
        trials: Trials so far, in order.
        evaluations: Number of merges to try.

    Example:
        ```python
        >>> next_t([], evaluations=9)
        '0.5'
        ```
    """
    tilts = _TILTS if evaluations >= MIN_EVALUATIONS + _TILTS else 0
    remaining = evaluations - len(trials)
    if remaining <= 0:
        return None
    if len(trials) < len(_GRID):
        return _GRID[len(trials)]
    means = {float(trial.t): trial.mean for trial in trials if ":" not in trial.t}
    if remaining > tilts:
        return str(_midpoint_beside_best(means))
    best_t = max(means, key=lambda t: means[t])
    low, high = f"{max(0.0, best_t - _TILT):g}", f"{min(1.0, best_t + _TILT):g}"
    return f"{low}:{high}" if remaining == tilts else f"{high}:{low}"


def _midpoint_beside_best(means: Mapping[float, float]) -> float:
    """Return the midpoint between the best `t` and its more distant neighbour; at equal distance, the better one.

    Args:
        means: Constant `t` -> mean nDCG@10, in the order of the trials.
    """
    values = sorted(means)
    # Of equal ones the first that was tried, whose merge is kept.
    best = values.index(max(means, key=lambda t: means[t]))
    neighbours = values[max(0, best - 1) : best] + values[best + 1 : best + 2]
    neighbour = max(neighbours, key=lambda t: (abs(t - values[best]), means[t]))
    return (values[best] + neighbour) / 2


def _percent(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: 100 * value for name, value in metrics.items()}


def _plot(trials: Sequence[Trial], path: Path) -> None:
    figure = new_plot(7, 4)
    axes = figure.subplots()
    constants = sorted((trial for trial in trials if ":" not in trial.t), key=lambda trial: float(trial.t))
    positions = [float(trial.t) for trial in constants]
    names = list(trials[0].metrics)
    for name in names if len(names) > 1 else []:
        axes.plot(positions, [100 * trial.metrics[name] for trial in constants], alpha=0.5, linewidth=1, label=name)
    axes.plot(positions, [100 * trial.mean for trial in constants], "k-o", label="mean" if len(names) > 1 else names[0])
    for trial in trials:
        if ":" in trial.t:
            axes.axhline(100 * trial.mean, linestyle="--", linewidth=1, color="gray", label=f"t {trial.t}")
    axes.set_xlabel("t: 0 is the first model, 1 the second")
    axes.set_title("nDCG@10 x 100 of the merged model", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_plot(figure, path)
