"""Two processes on one machine: the same data as from one, and each pair scored by one of them."""

import json
import os
import subprocess

import pytest
import yaml
from small_adaptations import data_of, make_values, manifest_of, write_collection
from werkzeug import Response

from modeling_querit.adaptation.pipeline import STAGE_NAMES, Adaptation
from modeling_querit.adaptation.settings import AdaptSettings

HTTPServer = pytest.importorskip("pytest_httpserver").HTTPServer
DATA_STAGES = STAGE_NAMES[:4]

pytestmark = pytest.mark.slow


def adapt_with_two_processes(python, config, *flags):
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "modeling_querit", "adapt", config, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def refuse_foxes(request):
    """Answer of `/rerank`; queries about foxes are refused."""
    payload = request.get_json()
    if "fox" in payload["query"]:
        return Response("no foxes", 413)
    results = [{"index": n, "relevance_score": n / 8} for n in range(len(payload["documents"]))]
    return Response(json.dumps({"results": results}), content_type="application/json")


def test_two_processes_write_the_same_data_as_one(saved_folders, tmp_path, forked_python):
    write_collection(tmp_path / "collection")
    values = make_values(tmp_path, saved_folders("qwen3"), train={"per_device_train_batch_size": 2, "max_steps": 2})
    Adaptation(AdaptSettings.model_validate(values | {"output_dir": str(tmp_path / "1")})).run(DATA_STAGES)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "2")}))
    result = adapt_with_two_processes(forked_python, tmp_path / "config.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    assert data_of(tmp_path / "1") == data_of(tmp_path / "2")
    for teacher in ("bm25", "student"):
        batches = [len(list((tmp_path / run / "cache" / "scores" / teacher).glob("*.parquet"))) for run in "12"]
        assert batches[0] == batches[1] > 0
    # Only the main process reports.
    assert result.stderr.count("4/6 teachers") == 1
    assert (tmp_path / "2" / "report" / "report.md").exists()


def test_failures_are_summed_over_processes(saved_folders, tmp_path, forked_python):
    write_collection(tmp_path / "collection")
    with HTTPServer(threaded=True) as server:
        server.expect_request("/v1/rerank").respond_with_handler(refuse_foxes)
        remote = {"type": "endpoint", "url": server.url_for("/v1"), "model": "m", "batch_size": 6}
        values = make_values(tmp_path, saved_folders("qwen3")) | {"teachers": {"remote": remote}}
        Adaptation(AdaptSettings.model_validate(values | {"output_dir": str(tmp_path / "1")})).run(DATA_STAGES)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "2")}))
        result = adapt_with_two_processes(
            forked_python, tmp_path / "config.yaml", *(f"--stage={name}" for name in DATA_STAGES)
        )
    assert result.returncode == 0, result.stderr[-3000:]
    counts = [manifest_of(tmp_path / run)["stages"]["teachers"]["counts"] for run in "12"]
    assert counts[0]["failed"]["remote"] > 6
    assert counts[1] == counts[0]
