"""`train.json`, the record that makes a run repeatable, and the checks before a run is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..environment import environment
from ..files import plain_json, sha256
from .arguments import TrainingSettings, changed_settings

RECORD_FILE = "train.json"
MODEL_FOLDER = "model"
# Settings that may differ between a run and its continuation: where it writes, what it logs, when it stops.
CHANGEABLE_ON_RESUME = {
    *("output_dir", "resume", "resume_from_checkpoint", "validation", "stop_on_collapse"),
    *("report_to", "logging_steps", "disable_tqdm", "dataloader_num_workers"),
    *("max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit"),
    *("do_eval", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "validation_depth"),
    "load_best_model_at_end",
    *("logging_strategy", "logging_first_step", "logging_dir", "run_name", "use_cpu", "push_to_hub", "hub_model_id"),
}

Record = dict[str, Any]


def make_record(settings: TrainingSettings, files: Iterable[Path], processes: int) -> Record:
    """Make what `train.json` holds, except for the hash of the rows.

    Args:
        settings: Settings of the run.
        files: Files that rows are read from.
        processes: Number of processes that train together.

    Returns:
        `settings` (those that are not defaults), `resolved` (all), `processes`, `versions`, `git_revision`, `sha256`.
    """
    return {
        "settings": {name: value for part in settings.parts for name, value in changed_settings(part).items()},
        "resolved": {type(part).__name__: _resolved(part) for part in settings.parts},
        "processes": processes,
        **environment(),
        "sha256": {str(path): sha256(path) for path in files},
    }


def check_output_dir(output_dir: Path, record: Record, is_resumed: bool) -> None:
    """Check that a folder holds no other run than the one that is resumed.

    Args:
        output_dir: Folder that the run would write to.
        record: Record of the run.
        is_resumed: Whether the run may go on from a checkpoint in the folder.

    Raises:
        ValueError: if it holds a run that is not resumed, or one that was begun with other data or settings.
    """
    if newest_checkpoint(output_dir) is not None:
        if not is_resumed:
            raise ValueError(f"{output_dir} holds checkpoints of a run: add --resume, or name another output_dir.")
        _check_same_run(output_dir, record)
    elif (output_dir / MODEL_FOLDER).exists() and not is_resumed:
        raise ValueError(f"{output_dir / MODEL_FOLDER} exists: name another output_dir, or remove it first.")


def _check_same_run(output_dir: Path, record: Record) -> None:
    path = output_dir / RECORD_FILE
    if not path.exists():
        return
    before = plain_json(json.loads(path.read_text(encoding="utf-8")))
    now = plain_json(record)
    for name in sorted((before["settings"].keys() | now["settings"].keys()) - CHANGEABLE_ON_RESUME):
        old, new = _parsed(before["settings"].get(name)), now["settings"].get(name)
        if old != new:
            raise ValueError(
                f"{output_dir} was begun with {name} {old!r}, not {new!r}: give the same value, or another output_dir."
            )
    if before.get("processes", now["processes"]) != now["processes"]:
        raise ValueError(
            f"{output_dir} was begun by {before['processes']} processes, not {now['processes']}: batches would differ."
        )
    changed = [name for name, digest in before["sha256"].items() if now["sha256"].get(name, digest) != digest]
    if changed:
        raise ValueError(
            f"{changed[0]} has changed since the run in {output_dir} began: restore it, or name another output_dir."
        )


def _parsed(value: Any) -> Any:
    """Return a recorded setting; records of earlier versions hold mappings as JSON text."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Find the last complete checkpoint of a run; a killed process may have left an incomplete one."""
    checkpoints = sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
    return next((path for path in checkpoints if _step(path) >= 0 and _is_complete(path)), None)


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def _is_complete(checkpoint: Path) -> bool:
    try:
        # The Trainer writes this file last.
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _resolved(part: Any) -> dict[str, Any]:
    if hasattr(part, "to_sanitized_dict"):
        # Leaves out tokens of hubs.
        return part.to_sanitized_dict()
    return dataclasses.asdict(part)
