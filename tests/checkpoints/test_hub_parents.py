"""Models by their names on a Hub: which revision is read, and what is said where the Hub breaks off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants
from tiny_parents import make_adapter

from modeling_querit.checkpoints.loading import load_for_training
from modeling_querit.checkpoints.parents import open_parent

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_good": "someone"}) as server:
        yield server


@pytest.fixture
def api(hub, online, monkeypatch, tmp_path):
    """A client; what is downloaded goes to a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return HfApi(endpoint=hub.url, token="hf_good")


def upload(api, name, folder):
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)


def test_an_adapter_is_converted_with_the_revision_it_was_trained_on(hub, api, saved_folders, tmp_path):
    """The branch of its base has no weights any more."""
    folder = saved_folders("qwen3")
    make_adapter(tmp_path / "adapter", load_for_training(folder))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "someone/base", "revision": "v1"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    upload(api, "someone/base", folder)
    api.create_tag("someone/base", tag="v1")
    api.delete_file("model.safetensors", repo_id="someone/base")
    upload(api, "someone/adapter", tmp_path / "adapter")
    command = [sys.executable, "-m", "modeling_querit", "convert", "someone/adapter", str(tmp_path / "whole")]
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, base = tiny.read_tensors(tmp_path / "whole"), tiny.read_tensors(folder)
    assert whole.keys() == base.keys()
    assert not all(whole[key].equal(base[key]) for key in base)


def test_a_download_that_breaks_off_is_one_line(hub, api, saved_folders, tmp_path):
    upload(api, "someone/far", saved_folders("qwen3"))
    hub.faults.append(Fault("GET", "/api/models/someone/far", times=1_000, cut=True))
    with pytest.raises(ConnectionError, match=r"someone/far did not arrive .* give the same command again"):
        open_parent("someone/far", tmp_path)
    hub.faults.clear()
