"""Two processes on one machine: the same data as one, each pair scored by one of them."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from small_adaptations import dataset_of, make_values, write_collection

from modeling_querit.adaptation.pipeline import Adaptation
from modeling_querit.adaptation.settings import AdaptSettings


def adapt_as_two(config):
    querit = Path(sys.executable).with_name("querit")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, querit, "adapt", config], env=environment, capture_output=True, text=True)


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
