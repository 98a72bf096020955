"""What is written beside a trained model, so that the run can be repeated, and checked before one goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..environment import environment
from ..files import sha256
from .settings import changed_settings

RECORD_FILE = "train.json"
# What may differ between a run and its continuation: where it is, how it looks, when it stops.
FREE = {
    *("output_dir", "resume", "resume_from_checkpoint", "validation", "stop_on_collapse"),
    *("report_to", "logging_steps", "disable_tqdm", "dataloader_num_workers"),
    *("max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit"),
    *("do_eval", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "validation_depth"),
    "load_best_model_at_end",
    *("logging_strategy", "logging_first_step", "logging_dir", "run_name", "use_cpu", "push_to_hub", "hub_model_id"),
}


def make_record(settings: Sequence[Any], files: Iterable[Path], processes: int) -> dict[str, Any]:
    """Settings that are not defaults, all settings as resolved, versions, git revision, hashes of the data."""
    return {
        "settings": {name: value for part in settings for name, value in changed_settings(part).items()},
        "resolved": {type(part).__name__: _resolved(part) for part in settings},
        "processes": processes,
        **environment(),
        "sha256": {str(path): sha256(path) for path in files},
    }


def check_same_run(record: dict[str, Any], output_dir: Path) -> None:
    """Raise a ValueError if what is in `output_dir` was made from other data or settings."""
    path = output_dir / RECORD_FILE
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(record, default=str))
    for name in sorted((before["settings"].keys() | now["settings"].keys()) - FREE):
        if before["settings"].get(name) != now["settings"].get(name):
            raise ValueError(
                f"{output_dir} was begun with {name} {before['settings'].get(name)!r}, not "
                f"{now['settings'].get(name)!r}: a run goes on as it began. Give the same, or another output_dir."
            )
    if before.get("processes", now["processes"]) != now["processes"]:
        raise ValueError(
            f"{output_dir} was begun by {before['processes']} processes, not {now['processes']}: batches would differ."
        )
    changed = [name for name, digest in before["sha256"].items() if now["sha256"].get(name, digest) != digest]
    if changed:
        raise ValueError(f"{changed[0]} has changed since the run in {output_dir} began: it cannot go on from there.")


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that was written to its end; a killed run may have left half of one behind it."""
    found = sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: -_step_of(path))
    return next((path for path in found if _step_of(path) >= 0 and _is_whole(path)), None)


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def _is_whole(checkpoint: Path) -> bool:
    try:
        # The Trainer writes it last.
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _resolved(arguments: Any) -> dict[str, Any]:
    if hasattr(arguments, "to_sanitized_dict"):
        # Tokens for hubs are not written down.
        return arguments.to_sanitized_dict()
    return dataclasses.asdict(arguments)
