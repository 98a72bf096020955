"""Reference scores: fixed pairs and their scores, which travel with a model so that a load can be verified."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from ..modeling_querit import QueritForSequenceRanking

REFERENCE_FILE = "reference_scores.json"
# In float32, for any order of summation; a wrong head, text or token changes scores by far more.
TOLERANCE = 1e-3
_TIMEOUT_MINUTES = 60
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


class Reference(TypedDict):
    """Contents of `reference_scores.json`: pairs of query and document, and the score of each in this data type."""

    dtype: str
    pairs: list[list[str]]
    scores: list[float]


def compute_reference(folder: Path) -> Reference:
    """Score the fixed pairs in float32, one by one."""
    model = QueritForSequenceRanking.from_pretrained(folder, dtype=torch.float32)
    scores = [float(model.predict([pair])[0]) for pair in PAIRS]
    return {"dtype": "float32", "pairs": [list(pair) for pair in PAIRS], "scores": scores}


def read_reference(path: Path) -> Reference:
    """Read reference scores.

    Raises:
        ValueError: if the file is not JSON, or not a record of pairs and scores.
    """
    try:
        reference = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, and it will be written again.") from None
    if not _is_reference(reference):
        raise ValueError(f"{path} is not a record of pairs and their scores: delete it, and it will be written again.")
    return reference


def find_score_problems(folder: Path, reference: Reference) -> list[str]:
    """Compare a folder's scores in a fresh process with its reference scores; list differences, one sentence each.

    Raises:
        ModuleNotFoundError, ValueError: as in `score_in_fresh_process`.
    """
    scores = score_in_fresh_process(folder, reference["pairs"])
    return list(_differences(reference["scores"], scores))


def score_in_fresh_process(folder: Path, pairs: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """Score pairs by AutoModel and CrossEncoder in a process with empty caches that cannot import this package.

    Args:
        folder: Folder of the model.
        pairs: Pairs of query and document.

    Returns:
        "AutoModel" and "CrossEncoder" -> the score of each pair.

    Raises:
        ModuleNotFoundError: if sentence-transformers is not installed.
        ValueError: if the folder does not load; the message has the last line of the process's errors.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ModuleNotFoundError(
            "A release is checked with sentence-transformers: pip install 'modeling-querit[sentence-transformers]'."
        )
    with tempfile.TemporaryDirectory(prefix="querit-release-") as temporary:
        pairs_file, scores_file = Path(temporary) / "pairs.json", Path(temporary) / "scores.json"
        pairs_file.write_text(json.dumps(list(pairs)), encoding="utf-8")
        program = Path(__file__).with_name("fresh_process.py")
        # Absolute, since the process runs in another folder.
        command = [sys.executable, "-I", *map(str, (program, folder.resolve(), pairs_file, scores_file))]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        isolated = {"HF_HOME": temporary, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            process = subprocess.run(
                command,
                env=inherited | isolated,
                cwd=temporary,
                capture_output=True,
                text=True,
                timeout=60 * _TIMEOUT_MINUTES,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{folder} took more than {_TIMEOUT_MINUTES} minutes to load and score {len(pairs)} pairs."
            ) from None
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines() or ["no error message"]
            raise ValueError(f"{folder} does not load where this package is not installed: {lines[-1]}")
        return json.loads(scores_file.read_text(encoding="utf-8"))


def _is_reference(value: object) -> bool:
    pairs, scores = (value.get(key) if isinstance(value, dict) else None for key in ("pairs", "scores"))
    if not isinstance(pairs, list) or not isinstance(scores, list) or not 0 < len(pairs) == len(scores):
        return False
    return all(map(_is_pair, pairs)) and all(map(_is_score, scores))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _differences(expected: Sequence[float], scores_by_runtime: Mapping[str, Sequence[float]]) -> Iterator[str]:
    for runtime, scores in scores_by_runtime.items():
        pairs = enumerate(zip(scores, expected, strict=True))
        # Not "larger than": NaN differs as well.
        differing = [index for index, (score, reference) in pairs if not abs(score - reference) <= TOLERANCE]
        if differing:
            index = differing[0]
            yield (
                f"{runtime} gives {scores[index]:.6f} for pair {index} of {REFERENCE_FILE}, which records "
                f"{expected[index]:.6f}: weights, tokenizer or code have changed, or the record is old (delete it)."
            )
