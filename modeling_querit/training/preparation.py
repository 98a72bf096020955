"""The rows of a run: read, checked against each other and the settings, and written down so that it can be repeated."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import jsonl_sha256, write_json, write_jsonl
from .arguments import QueritTrainingArguments
from .checks import check_differences, check_labels, check_metric
from .reading import Rejects, read_rows
from .record import RECORD_FILE, check_same_run, make_record, newest_checkpoint
from .rows import Row, has_scores
from .settings import DataArguments, RunArguments, Settings
from .sources import files_of, stream_rows, training_rows, validation_rows

logger = logging.getLogger(__name__)

ROWS_FILE = "train_rows.jsonl"
REJECTS_FILE = "rejects.jsonl"
# Of a stream, which is read again and again; the other holds what was wrong with the validation rows.
STREAM_REJECTS_FILE = "rejects_of_stream.jsonl"
# Queries of a stream that are shuffled among each other.
_SHUFFLE_BUFFER = 1000

# Rows by the name of the collection.
Validation = dict[str, list[Row]]


def prepare(settings: Settings, output_dir: Path) -> tuple[Any, Validation]:
    """The rows to train on, a list or a stream, and those to validate on.

    The first process writes down what they are, before others read it: settings, versions and hashes (`train.json`),
    the rows (`train_rows.jsonl`) and those that were broken (`rejects.jsonl`).

    Raises:
        ValueError: if there are no rows, a loss could not learn from them, or the folder holds another run.
    """
    _, data_args, run_args, args = settings
    if args.process_index:
        return _read_prepared(data_args, args, output_dir)
    with Rejects(output_dir / REJECTS_FILE) as rejects:
        validation = _read_validation(data_args, args, rejects)
        stream = _stream(data_args, args) if data_args.streaming else None
        rows = None if stream else list(_of_one_kind(training_rows(data_args, args.seed, rejects), rejects))
    if rejects.count:
        logger.warning("%d broken rows were set aside in %s.", rejects.count, rejects.path)
    if rows is not None:
        _check_rows(rows, validation, data_args, args)
    # Nothing is written before everything that can be wrong has been read.
    sources = [*data_args.train, *data_args.validation]
    record = make_record(settings, [path for source in sources for path in files_of(source)], args.world_size)
    if rows is not None:
        # Tables have columns, such as times, that JSON has no value for.
        record["sha256"][ROWS_FILE] = jsonl_sha256(rows, default=str)
    _check_folder(output_dir, record, run_args, args)
    if rows is not None:
        write_jsonl(rows, output_dir / ROWS_FILE, default=str)
        logger.info("Training on %d queries with %d documents.", len(rows), sum(len(row["documents"]) for row in rows))
    write_json(record, output_dir / RECORD_FILE)
    return stream if rows is None else rows, validation


def _read_prepared(data_args: DataArguments, args: QueritTrainingArguments, output_dir: Path) -> tuple[Any, Validation]:
    """What the first process prepared, in another one."""
    with Rejects(None) as rejects:
        validation = _read_validation(data_args, args, rejects)
    return _stream(data_args, args) if data_args.streaming else list(read_rows(output_dir / ROWS_FILE)), validation


def _read_validation(data_args: DataArguments, args: QueritTrainingArguments, rejects: Rejects) -> Validation:
    found = validation_rows(data_args, args.seed, rejects)
    validation = {name: [_judged(row) for row in each] for name, each in found.items()}
    if empty := [name for name, each in validation.items() if not each]:
        raise ValueError(f"There are no rows to validate on in {empty[0]}.")
    if validation and args.metric_for_best_model is not None:
        check_metric(args.metric_for_best_model, validation)
    return validation


def _judged(row: Row) -> Row:
    """A row to validate on: by its labels, if it has any, whatever teachers said of it."""
    return row if row.get("labels") is None else {key: value for key, value in row.items() if key != "scores"}


def _check_rows(
    rows: list[Row], validation: Validation, data_args: DataArguments, args: QueritTrainingArguments
) -> None:
    if not rows:
        raise ValueError(f"There are no rows in {', '.join(data_args.train)}.")
    check_labels(rows, args.losses)
    check_differences(rows, args.losses)
    if rows[0].get("labels") is None:
        return
    if data_args.teacher_weights or data_args.calibration != "quantile":
        raise ValueError("teacher_weights and calibration are for rows of scores, but the first row has labels.")
    if any(row.get("labels") is None for each in validation.values() for row in each):
        raise ValueError("A run on labels is validated on labels, but there are validation rows with scores alone.")


def _check_folder(
    output_dir: Path, record: dict[str, Any], run_args: RunArguments, args: QueritTrainingArguments
) -> None:
    """Raise a ValueError if there is a run in the folder that this one does not go on with."""
    if newest_checkpoint(output_dir) is not None:
        if not run_args.resume and not args.resume_from_checkpoint:
            raise ValueError(
                f"{output_dir} holds checkpoints of a run: go on with --resume, or name another output_dir."
            )
        check_same_run(record, output_dir)
    elif (output_dir / "model").exists() and not run_args.resume:
        raise ValueError(f"{output_dir / 'model'} is there: name another output_dir, or remove it first.")


def _stream(data_args: DataArguments, args: QueritTrainingArguments) -> Any:
    from datasets import IterableDataset

    name = STREAM_REJECTS_FILE if args.process_index == 0 else f".{STREAM_REJECTS_FILE}.{args.process_index}"
    given = {"args": data_args, "seed": args.seed, "path": Path(args.output_dir) / name, "losses": args.losses}
    return IterableDataset.from_generator(_read_stream, gen_kwargs=given).shuffle(
        args.seed, buffer_size=_SHUFFLE_BUFFER
    )


def _read_stream(args: DataArguments, seed: int, path: Path, losses: list[str]) -> Iterator[Row]:
    """The rows again and again, without an end: a run that goes on in a later pass skips what it has seen of all."""
    is_empty = True
    with Rejects(path) as rejects:
        for row in _of_one_kind(stream_rows(args.train, args, seed, rejects), rejects):
            check_labels([row], losses)
            is_empty = False
            yield row
    if path.name != STREAM_REJECTS_FILE:
        path.unlink(missing_ok=True)
    elif rejects.count:
        logger.warning("%d broken rows were set aside in %s.", rejects.count, rejects.path)
    if is_empty:
        raise ValueError(f"There are no rows in {', '.join(args.train)}.")
    while True:
        yield from _of_one_kind(stream_rows(args.train, args, seed, Rejects(None)), Rejects(None))


def _of_one_kind(rows: Iterable[Row], rejects: Rejects) -> Iterator[Row]:
    """Rows with labels, or, if the first one has none, rows with scores; the others are set aside."""
    kind = None
    for number, row in enumerate(rows, start=1):
        kind = kind or ("scores" if row.get("labels") is None else "labels")
        if row.get("labels") is not None if kind == "labels" else has_scores(row):
            yield row
        else:
            message = f"Row {number} of those to train on: no {kind!r}, which the first row has; a run learns from one."
            rejects.add(ValueError(message), row)
