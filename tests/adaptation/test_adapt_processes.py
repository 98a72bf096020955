"""Two processes on one machine: the same data as one, each pair scored by one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_adaptations import dataset_of, make_values, manifest_of, write_collection
from werkzeug import Response

from modeling_querit.adaptation.pipeline import STAGES, Adaptation
from modeling_querit.adaptation.settings import AdaptSettings

HTTPServer = pytest.importorskip("pytest_httpserver").HTTPServer


def adapt_as_two(config, *flags):
    querit = Path(sys.executable).with_name("querit")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, querit, "adapt", config, *flags], env=environment, capture_output=True, text=True)


def score_all_but_foxes(request):
    """Scores of /rerank, but none for queries about foxes."""
    asked = request.get_json()
    if "fox" in asked["query"]:
        return Response("no foxes", 413)
    scores = [{"index": n, "relevance_score": n / 8} for n in range(len(asked["documents"]))]
    return Response(json.dumps({"results": scores}), content_type="application/json")


def test_two_processes_adapt_as_one(saved_folders, tmp_path):
    write_collection(tmp_path / "collection")
    values = make_values(tmp_path, saved_folders("qwen3"), train={"per_device_train_batch_size": 2, "max_steps": 2})
    Adaptation(AdaptSettings.model_validate(values | {"output_dir": str(tmp_path / "1")})).run()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "2")}))
    done = adapt_as_two(tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert dataset_of(tmp_path / "1") == dataset_of(tmp_path / "2")
    for teacher in ("bm25", "student"):
        shards = sorted((tmp_path / "2" / "cache" / "scores" / teacher).glob("*.parquet"))
        assert len(shards) == len(list((tmp_path / "1" / "cache" / "scores" / teacher).glob("*.parquet")))
    # The main process speaks for all.
    assert done.stderr.count("4/6 teachers") == 1
    assert (tmp_path / "2" / "report" / "report.md").exists()


def test_what_all_processes_set_aside_is_counted(saved_folders, tmp_path):
    write_collection(tmp_path / "collection")
    with HTTPServer(threaded=True) as server:
        server.expect_request("/v1/rerank").respond_with_handler(score_all_but_foxes)
        remote = {"type": "endpoint", "url": server.url_for("/v1"), "model": "m", "batch_size": 6}
        values = make_values(tmp_path, saved_folders("qwen3")) | {"teachers": {"remote": remote}}
        Adaptation(AdaptSettings.model_validate(values | {"output_dir": str(tmp_path / "1")})).run(STAGES[:4])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "2")}))
        done = adapt_as_two(tmp_path / "config.yaml", *(f"--stage={name}" for name in STAGES[:4]))
    assert done.returncode == 0, done.stderr[-3000:]
    as_one, as_two = (manifest_of(tmp_path / name)["stages"]["teachers"]["counts"] for name in "12")
    assert as_one["set aside"]["remote"] > 6
    assert as_two == as_one
