"""Known pairs and their scores, which travel with a model: whoever loads it can see that it is whole."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..modeling_querit import QueritForSequenceRanking

REFERENCE_FILE = "reference_scores.json"
# In float32, whatever order a machine adds up in; a wrong head, text or token moves scores by far more.
TOLERANCE = 1e-3
_MINUTES = 60
PAIRS: tuple[tuple[str, str], ...] = (
    ("who wrote Faust", "Goethe finished the second part of Faust in 1831, a year before his death."),
    ("who wrote Faust", "A fist is a closed hand."),
    ("how do I list open ports", "ss -tulpn shows listening sockets and the processes they belong to."),
    ("how do I list open ports", "The port of Hamburg handles eight million containers a year."),
    ("怎样查看磁盘空间", "df -h 显示每个文件系统的已用空间和可用空间。"),
    ("怎样查看磁盘空间", "明天北京有雨。"),
    ("¿cuál es la capital de Perú?", "Lima is the capital and largest city of Peru."),
    ("¿cuál es la capital de Perú?", ""),
)


def reference_of(folder: Path) -> dict[str, Any]:
    """The scores of the pairs in float32, pair by pair, as they are recorded."""
    model = QueritForSequenceRanking.from_pretrained(folder, dtype=torch.float32)
    scores = [float(model.predict([pair])[0]) for pair in PAIRS]
    return {"dtype": "float32", "pairs": [list(pair) for pair in PAIRS], "scores": scores}


def scores_of_a_stranger(folder: Path, pairs: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """What AutoModel and CrossEncoder give in a process that does not know this package, with empty caches.

    Raises:
        ModuleNotFoundError: if sentence-transformers is not installed.
        ValueError: if the folder does not load; the message is that of the process.
    """
    import importlib.util

    if importlib.util.find_spec("sentence_transformers") is None:
        raise ModuleNotFoundError(
            "The folder is tried with sentence-transformers: pip install 'modeling-querit[sentence-transformers]'."
        )
    with tempfile.TemporaryDirectory(prefix="querit-stranger-") as aside:
        given, out = Path(aside) / "pairs.json", Path(aside) / "scores.json"
        given.write_text(json.dumps(list(pairs)), encoding="utf-8")
        command = [
            sys.executable,
            "-I",
            str(Path(__file__).with_name("stranger.py")),
            # It starts elsewhere.
            str(folder.resolve()),
            str(given),
            str(out),
        ]
        clean = {"HF_HOME": aside, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        options = {"capture_output": True, "text": True, "timeout": 60 * _MINUTES, "check": False}
        try:
            done = subprocess.run(command, env=kept | clean, cwd=aside, **options)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{folder} took more than {_MINUTES} minutes to load and score {len(pairs)} pairs."
            ) from None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["it ended without a word"]
            raise ValueError(f"{folder} does not load where this package is not installed: {lines[-1]}")
        return json.loads(out.read_text(encoding="utf-8"))


def read_reference(path: Path) -> dict[str, Any]:
    """What is recorded in a file.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it, and it is written again.") from None


def check_scores(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Compare what a stranger gets with what is recorded; what differs, a sentence each.

    Raises:
        ModuleNotFoundError, ValueError: as `scores_of_a_stranger`; or if the record is none.
    """
    _check_record(recorded)
    found = scores_of_a_stranger(folder, recorded["pairs"])
    return list(_differences(recorded["scores"], found))


def _check_record(recorded: Any) -> None:
    """Raise a ValueError unless there are pairs, each with a score."""
    pairs, scores = (recorded.get("pairs"), recorded.get("scores")) if isinstance(recorded, Mapping) else (None, None)
    is_whole = isinstance(pairs, list) and isinstance(scores, list) and 0 < len(pairs) == len(scores)
    if not (is_whole and all(map(_is_pair, pairs)) and all(map(_is_score, scores))):
        raise ValueError(
            f"{REFERENCE_FILE} is no record of pairs and their scores: delete it, and it is written again."
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _differences(recorded: Sequence[float], found: Mapping[str, Sequence[float]]) -> list[str]:
    problems = []
    for name, scores in found.items():
        # Not "larger than": a NaN is no good score either.
        off = [place for place, score in enumerate(scores) if not abs(score - recorded[place]) <= TOLERANCE]
        if off or len(scores) != len(recorded):
            place = off[0] if off else 0
            problems.append(
                f"{name} gives {scores[place]:.6f} for pair {place} of {REFERENCE_FILE}, where {recorded[place]:.6f} "
                "is recorded: weights, tokenizer or code changed since, or the record is old (delete it)."
            )
    return problems
