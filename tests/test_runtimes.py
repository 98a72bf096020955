"""The runtimes of docs/runtimes.md that tokenize by themselves, with the real packages and without ours."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

RUNTIMES = [
    *("AutoTokenizer, left", "AutoTokenizer, right", "AutoProcessor, left", "AutoProcessor, right", "pipeline"),
    *("rerankers", "txtai", "LangChain", "LlamaIndex", "Haystack, False", "Haystack, True", "PyTerrier", "ONNX"),
]


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def scores(request, saved_folders, models, forked_python, tmp_path_factory):
    """Scores of all runtimes, in one process, and those of `predict`."""
    for package in ("rerankers", "txtai", "langchain_community", "haystack_integrations", "pyterrier", "onnxscript"):
        pytest.importorskip(package)
    work = tmp_path_factory.mktemp("runtimes")
    folder = shutil.copytree(saved_folders(request.param), work / "my-reranker-v1.0")
    inputs = {
        "folder": str(folder),
        "query": tiny.QUERY,
        "documents": tiny.STRINGS,
        "result": str(work / "result.json"),
    }
    (work / "inputs.json").write_text(json.dumps(inputs))
    done = subprocess.run(
        [forked_python, str(Path(__file__).with_name("fresh_runtimes.py")), str(work / "inputs.json")],
        cwd=work,
        env=os.environ | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=570,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = models(request.param).predict(tiny.pairs(tiny.STRINGS)).tolist()
    return json.loads((work / "result.json").read_text()), expected


@pytest.mark.slow
def test_no_runtime_is_left_out(scores):
    assert list(scores[0]) == RUNTIMES


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_score_is_that_of_predict(scores, runtime):
    assert scores[0][runtime] == pytest.approx(scores[1], abs=1e-5)
