"""From sources to checked rows: files, tables and mined collections, checked against the settings and saved."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from ..checkpoints.loading import check_available
from ..evaluation.evaluate import Reranker
from ..files import jsonl_sha256, write_json, write_jsonl
from ..rejects import Rejects
from ..retrieval.bm25 import BM25
from ..retrieval.collection import Collection, Source
from ..retrieval.sampling import Bands, Retriever
from . import mining
from .arguments import VALIDATION_METRICS, DataArguments, QueritTrainingArguments, TrainingSettings
from .data import ROW_FILES, Row, checked_rows, has_scores, is_collection, read_rows, read_table
from .losses import needs_unit_labels
from .record import RECORD_FILE, Record, check_output_dir, make_record

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

ROWS_FILE = "train_rows.jsonl"
REJECTS_FILE = "rejects.jsonl"
# Rejected rows of a stream are known only during training; REJECTS_FILE holds those of the validation sources.
STREAM_REJECTS_FILE = "rejects_of_stream.jsonl"

_SHUFFLE_BUFFER_ROWS = 1000
_TRAIN_SPLIT, _VALIDATION_SPLIT = "train", "dev"

# Rows by the name of the source.
Validation = dict[str, list[Row]]
Value = TypeVar("Value")


def prepare(settings: TrainingSettings, output_dir: Path) -> tuple[list[Row] | IterableDataset, Validation]:
    """Prepare training and validation rows.

    The main process writes them, before the other processes read them: `train.json` (settings, versions, hashes),
    `train_rows.jsonl` and, if there are invalid rows, `rejects.jsonl`.

    Args:
        settings: Settings of the run.
        output_dir: Folder of the run, which all processes share.

    Returns:
        The training rows, a list or a stream, and the validation rows by the name of their source.

    Raises:
        ValueError: if there are no rows, a loss cannot learn from them, or the folder holds another run.
    """
    data_args, training_args = settings.data_args, settings.training_args
    if training_args.process_index:
        return _read_prepared(settings, output_dir)
    with Rejects(output_dir / REJECTS_FILE) as rejects:
        try:
            validation = _read_validation(settings, rejects)
            rows = None if data_args.streaming else _read_training_rows(data_args, training_args.seed, rejects)
            record = _checked_record(rows, validation, settings, output_dir, rejects)
        except Exception:
            rejects.discard()
            raise
    _warn_of(rejects)
    _write(rows, record, output_dir)
    return _stream(data_args, training_args) if rows is None else rows, validation


def _checked_record(
    rows: list[Row] | None, validation: Validation, settings: TrainingSettings, output_dir: Path, rejects: Rejects
) -> Record:
    """Check everything that can be wrong before anything is written, and return the record of the run."""
    if rows is not None:
        if not rows:
            raise ValueError(
                f"There are no rows in {', '.join(settings.data_args.train)}. {rejects.first_error}".strip()
            )
        _check_rows(rows, validation, settings)
    check_available(settings.model_args.model)
    record = make_record(settings, _files(settings.data_args), settings.training_args.world_size)
    if rows is not None:
        # Tables may have columns, such as times, that JSON cannot represent.
        record["sha256"][ROWS_FILE] = jsonl_sha256(rows, default=str)
    is_resumed = settings.run_args.resume or bool(settings.training_args.resume_from_checkpoint)
    check_output_dir(output_dir, record, is_resumed)
    return record


def _read_prepared(settings: TrainingSettings, output_dir: Path) -> tuple[list[Row] | IterableDataset, Validation]:
    """Read, in a worker process, the rows the main process prepared."""
    with Rejects(None) as rejects:
        validation = _read_validation(settings, rejects)
    if settings.data_args.streaming:
        return _stream(settings.data_args, settings.training_args), validation
    return list(read_rows(output_dir / ROWS_FILE)), validation


def _read_training_rows(args: DataArguments, seed: int, rejects: Rejects) -> list[Row]:
    return list(_rows_of_one_kind(training_rows(args, seed, rejects), rejects))


def _read_validation(settings: TrainingSettings, rejects: Rejects) -> Validation:
    validation = validation_rows(settings.data_args, settings.training_args.seed, rejects)
    empty = [name for name, rows in validation.items() if not rows]
    if empty:
        raise ValueError(f"There are no validation rows in {empty[0]}.")
    metric = settings.training_args.metric_for_best_model
    if validation and metric is not None:
        check_metric(metric, validation)
    return validation


def _write(rows: list[Row] | None, record: Record, output_dir: Path) -> None:
    if rows is not None:
        write_jsonl(rows, output_dir / ROWS_FILE, default=str)
        logger.info("Training on %d queries with %d documents.", len(rows), sum(len(row["documents"]) for row in rows))
    write_json(record, output_dir / RECORD_FILE)


def _warn_of(rejects: Rejects) -> None:
    if rejects.count:
        logger.warning("%d invalid rows were written to %s.", rejects.count, rejects.path)


def _files(args: DataArguments) -> list[Path]:
    """List the local files that the sources are read from."""
    files: list[Path] = []
    for sources, default_split in ((args.train, _TRAIN_SPLIT), (args.validation, _VALIDATION_SPLIT)):
        for text in sources:
            if is_collection(text):
                files += Source.parse(text, default_split).files()
            elif Path(text).exists():
                files.append(Path(text))
    return files


# -- Sources to rows


def training_rows(args: DataArguments, seed: int, rejects: Rejects) -> list[Row]:
    """Read rows of files and tables in their order, then mine rows from collections, evenly interleaved."""
    rows: list[Row] = []
    mined: list[tuple[float, Row]] = []
    false_negative_filter = _load_filter(args.false_negative_filter)
    for source in args.train:
        if not is_collection(source):
            rows += stream_rows([source], args, seed, rejects)
            continue
        collection = Source.parse(source, _TRAIN_SPLIT).load()
        collection_rows = mining.mine_rows(
            collection,
            bands=args.bands,
            retriever=_make_retriever(args.encoder, collection),
            false_negative_filter=false_negative_filter,
            false_negative_margin=args.false_negative_margin,
            easy_first=args.easy_first,
            limit=args.limit,
            max_positive_chars=args.max_positive_chars,
            seed=seed,
        )
        logger.info("%s: %d queries.", source, len(collection_rows))
        # Each collection is spread over the whole run: its easy rows come first, and it does not come in one block.
        checked = checked_rows(((row["source"], row) for row in collection_rows), rejects)
        mined += [(number / len(collection_rows), row) for number, row in enumerate(checked)]
    return rows + [row for _, row in sorted(mined, key=lambda pair: pair[0])]


def validation_rows(args: DataArguments, seed: int, rejects: Rejects) -> Validation:
    """Read validation rows by the name of the source: that of the folder, or of the file up to its first dot."""
    validation: Validation = {}
    for source in args.validation:
        name = Source.parse(source).folder.name.partition(".")[0]
        if name in validation:
            raise ValueError(f"Two validation sources are called {name!r}, which metrics are reported by: rename one.")
        if is_collection(source):
            collection = Source.parse(source, _VALIDATION_SPLIT).load()
            retriever = _make_retriever(args.encoder, collection)
            rows = mining.validation_rows(collection, retriever, args.validation_depth, args.limit, seed)
            validation[name] = list(checked_rows(((row["source"], row) for row in rows), rejects))
        else:
            validation[name] = [_without_scores(row) for row in stream_rows([source], None, seed, rejects)]
    return validation


def _without_scores(row: Row) -> Row:
    """Return a validation row without scores if it has labels: labels take precedence over teacher scores."""
    if row.get("labels") is None:
        return row
    without = row.copy()
    without.pop("scores", None)
    return without


def stream_rows(
    sources: Sequence[str], args: DataArguments | None, seed: int, rejects: Rejects | None = None
) -> Iterator[Row]:
    """Read rows of files and tables, one source after the other.

    Args:
        sources: Files of rows, and datasets on the Hub as `NAME:SPLIT`.
        args: Settings that say whether documents are sampled, and by which bands; None keeps all documents.
        seed: Seed of the samples.
        rejects: Collector of invalid rows.
    """
    for source in sources:
        if source.endswith(ROW_FILES):
            rows = read_rows(source, rejects)
        elif Path(source).exists() or source.startswith((".", "/", "~")):
            state = "is no file of rows" if Path(source).exists() else "does not exist"
            raise ValueError(f"{source} {state}: give .jsonl, .json or .parquet (one row a line), or a BEIR folder.")
        else:
            name, _, split = source.partition(":")
            rows = read_table(name, split or _TRAIN_SPLIT, rejects)
        for number, row in enumerate(rows):
            if args is not None and args.sample_rows:
                row = sample_documents(row, args.bands, random.Random(f"{seed}/{source}/{number}"))
            yield row


def sample_documents(row: Row, bands: Bands, rng: random.Random) -> Row:
    """Return a row with a sample of its documents; all documents with a label above 0 are kept.

    Args:
        row: Row whose documents are in the order of a first stage.
        bands: Rank bands, with the number of documents to draw from each.
        rng: Random generator for sampling.
    """
    labels = row.get("labels") or [0] * len(row["documents"])
    relevant = [index for index, label in enumerate(labels) if label > 0]
    others = [index for index, label in enumerate(labels) if label <= 0]
    indices = sorted([*relevant, *bands.draw(others, [], rng)])

    def select(values: Sequence[Value]) -> list[Value]:
        return [values[index] for index in indices]

    sample = row.copy()
    sample["documents"] = select(row["documents"])
    if (row_labels := row.get("labels")) is not None:
        sample["labels"] = select(row_labels)
    if (scores := row.get("scores")) is not None:
        sample["scores"] = {teacher: None if values is None else select(values) for teacher, values in scores.items()}
    return sample


def _make_retriever(encoder: str | None, collection: Collection) -> Retriever:
    if encoder is None:
        return BM25(collection.documents)
    from ..retrieval.dense import DenseIndex, load_encoder

    return DenseIndex(collection.documents, load_encoder(encoder))


def _load_filter(name: str | None) -> Reranker | None:
    if name is None:
        return None
    from ..checkpoints.loading import load_model

    return cast(Reranker, load_model(name))


def _rows_of_one_kind(rows: Iterable[Row], rejects: Rejects) -> Iterator[Row]:
    """Yield rows with labels, or, if the first row has none, rows with scores; reject the others."""
    kind = None
    for number, row in enumerate(rows, start=1):
        has_labels = row.get("labels") is not None
        kind = kind or ("labels" if has_labels else "scores")
        if has_labels if kind == "labels" else has_scores(row):
            yield row
        else:
            message = (
                f"Training row {number} has no {kind!r}, but the first row does: use labels or scores for all rows, "
                "not both."
            )
            rejects.add(ValueError(message), row)


# -- Streams


def _stream(data_args: DataArguments, training_args: QueritTrainingArguments) -> IterableDataset:
    from datasets import IterableDataset

    index = training_args.process_index
    name = STREAM_REJECTS_FILE if index == 0 else f".{STREAM_REJECTS_FILE}.{index}"
    generator_arguments = {
        "args": data_args,
        "seed": training_args.seed,
        "rejects_path": Path(training_args.output_dir) / name,
        "losses": training_args.losses,
    }
    stream = IterableDataset.from_generator(_endless_rows, gen_kwargs=generator_arguments)
    return stream.shuffle(training_args.seed, buffer_size=_SHUFFLE_BUFFER_ROWS)


def _endless_rows(args: DataArguments, seed: int, rejects_path: Path, losses: list[str]) -> Iterator[Row]:
    """Repeat the rows without end: a run that is resumed in a later pass skips the rows of all earlier passes."""
    is_empty = True
    with Rejects(rejects_path) as rejects:
        for row in _rows_of_one_kind(stream_rows(args.train, args, seed, rejects), rejects):
            check_labels([row], losses)
            is_empty = False
            yield row
    if rejects_path.name == STREAM_REJECTS_FILE:
        _warn_of(rejects)
    else:
        # The same rows as those of the main process.
        rejects_path.unlink(missing_ok=True)
    if is_empty:
        raise ValueError(f"There are no rows in {', '.join(args.train)}.")
    while True:
        yield from _rows_of_one_kind(stream_rows(args.train, args, seed, Rejects(None)), Rejects(None))


# -- Checks of rows against the settings


def _check_rows(rows: list[Row], validation: Validation, settings: TrainingSettings) -> None:
    data_args, losses = settings.data_args, settings.training_args.losses
    check_labels(rows, losses)
    check_differences(rows, losses)
    if rows[0].get("labels") is None:
        return
    if data_args.teacher_weights or data_args.calibration not in (None, "quantile"):
        raise ValueError("teacher_weights and calibration are for rows of scores, but the first row has labels.")
    if any(row.get("labels") is None for rows_of_source in validation.values() for row in rows_of_source):
        raise ValueError("A run on labels is validated on labels, but some validation rows have only scores.")


def check_labels(rows: Sequence[Row], losses: Sequence[str]) -> None:
    """Check labels against the losses: out-of-range labels make training diverge.

    Raises:
        ValueError: if a loss needs labels in [0, 1], and some are not.
    """
    labels = [label for row in rows for label in row.get("labels") or []]
    needing = [name for name in losses if needs_unit_labels(name)]
    if needing and labels and not 0 <= min(labels) <= max(labels) <= 1:
        raise ValueError(
            f"{needing[0]} needs labels in [0, 1], but they go from {min(labels)} to {max(labels)}: "
            "divide grades by the highest."
        )


def check_differences(rows: Sequence[Row], losses: Sequence[str]) -> None:
    """Check that documents are labelled differently; losses learn nothing from a query whose labels are all equal.

    Raises:
        ValueError: if the labels of every query are equal.
    """
    count = sum(_has_differences(row) for row in rows)
    if not count:
        raise ValueError(f"No query has two different labels, so {', '.join(losses)} would learn nothing.")
    if count < len(rows):
        logger.warning(
            "%d of %d queries have no two different labels: nothing is learned from them.", len(rows) - count, len(rows)
        )


def _has_differences(row: Row) -> bool:
    if (labels := row.get("labels")) is not None:
        return len(set(labels)) > 1
    scores = row.get("scores") or {}
    return any(len(set(values) - {None}) > 1 for values in scores.values() if values is not None)


def check_metric(metric: str, validation: Validation) -> None:
    """Check that validation will report a metric.

    Args:
        metric: `metric_for_best_model`: one of `VALIDATION_METRICS`, or `NAME_` before it for a single source.
        validation: Rows by the name of the source.

    Raises:
        ValueError: if there is no such source, or no row for which a ranking metric can be computed.
    """
    metric = metric.removeprefix("eval_")
    sources_by_metric = {name: list(validation) for name in VALIDATION_METRICS}
    for source in validation:
        sources_by_metric |= {f"{source}_{name}": [source] for name in VALIDATION_METRICS}
    if metric not in sources_by_metric:
        raise ValueError(f"metric_for_best_model is {metric!r}, but validation sources are {', '.join(validation)}.")
    rows = [row for source in sources_by_metric[metric] for row in validation[source]]
    has_relevant = any((labels := row.get("labels")) is None or max(labels) > 0 for row in rows)
    if not metric.endswith("loss") and not has_relevant:
        raise ValueError(f"metric_for_best_model is {metric!r}, but no validation row has a label above 0.")
