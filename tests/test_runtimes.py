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


@pytest.fixture(scope="module")
def all_scores(saved_folders, forked_python, tmp_path_factory):
    """Scores by architecture and runtime, all from one process."""
    for package in ("rerankers", "txtai", "langchain_community", "haystack_integrations", "pyterrier", "onnxscript"):
        pytest.importorskip(package)
    work = tmp_path_factory.mktemp("runtimes")
    folders = {
        architecture: str(shutil.copytree(saved_folders(architecture), work / f"my-{architecture}-v1.0"))
        for architecture in tiny.ARCHITECTURES
    }
    inputs = {"folders": folders, "query": tiny.QUERY, "documents": tiny.STRINGS, "result": str(work / "result.json")}
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
    return json.loads((work / "result.json").read_text())


@pytest.fixture
def scores(all_scores, models, architecture):
    """Scores of all runtimes, and those of `predict`."""
    return all_scores[architecture], models(architecture).predict(tiny.pairs(tiny.STRINGS)).tolist()


# Parametrized here and not by the fixture of the session, for which pytest would tear down `all_scores` in between.
of_both_architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


@pytest.mark.slow
@of_both_architectures
def test_no_runtime_is_left_out(scores):
    assert list(scores[0]) == RUNTIMES


@pytest.mark.slow
@of_both_architectures
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_score_is_that_of_predict(scores, runtime):
    assert scores[0][runtime] == pytest.approx(scores[1], abs=1e-5)
