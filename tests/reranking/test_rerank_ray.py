"""The example for Ray: two actors give the scores of the model, in the order of the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "rerank_with_ray.py"


@pytest.mark.slow
def test_two_workers_rerank_rows(models, saved_folders, tmp_path):
    pytest.importorskip("ray")
    rows = [{"query": f"who wrote {number}", "documents": tiny.DOCUMENTS, "id": number} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / "rows.jsonl", tmp_path / "out.jsonl"]
    command = [sys.executable, EXAMPLE, *files, "--model", saved_folders("qwen3"), "--workers", "2"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, scored in zip(rows, written, strict=True):
        expected = models("qwen3").predict(tiny.pairs(query=row["query"])).tolist()
        assert scored.pop("scores") == pytest.approx(expected, abs=1e-5)
        assert scored == row
