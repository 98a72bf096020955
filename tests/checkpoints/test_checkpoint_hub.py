"""Checkpoints from the Hub: which revision is read, and errors of the Hub."""

import json
import subprocess
from pathlib import Path

import pytest
import tiny
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants
from tiny_checkpoints import make_adapter

from modeling_querit.checkpoints.checkpoint import open_checkpoint
from modeling_querit.checkpoints.loading import load_for_training

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_good": "someone"}) as server:
        yield server


@pytest.fixture
def api(hub, online, monkeypatch, tmp_path):
    """A client whose downloads go to a cache of their own."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return HfApi(endpoint=hub.url, token="hf_good")


def upload(api, name, folder):
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)


@pytest.mark.slow
def test_an_adapter_is_converted_on_the_revision_it_was_trained_on(hub, api, saved_folders, forked_python, tmp_path):
    """The branch of its base model has no weights any more."""
    folder = saved_folders("qwen3")
    make_adapter(tmp_path / "adapter", load_for_training(folder))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "someone/base", "revision": "v1"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    upload(api, "someone/base", folder)
    api.create_tag("someone/base", tag="v1")
    api.delete_file("model.safetensors", repo_id="someone/base")
    upload(api, "someone/adapter", tmp_path / "adapter")
    command = [forked_python, "-m", "modeling_querit", "convert", "someone/adapter", str(tmp_path / "converted")]
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    converted, base = tiny.read_tensors(tmp_path / "converted"), tiny.read_tensors(folder)
    assert converted.keys() == base.keys()
    assert not all(converted[key].equal(base[key]) for key in base)


def test_a_broken_download_is_one_line(hub, api, saved_folders, tmp_path):
    upload(api, "someone/far", saved_folders("qwen3"))
    hub.faults.append(Fault("GET", "/api/models/someone/far", times=1_000, cut=True))
    with pytest.raises(ConnectionError, match=r"download of someone/far failed .* run the same command again"):
        open_checkpoint("someone/far", tmp_path)
    hub.faults.clear()


def test_a_missing_revision_is_named(api, tmp_path):
    api.create_repo("someone/young")
    with pytest.raises(OSError, match=r"someone/young has no revision v9: name a branch, a tag or a commit\.$"):
        open_checkpoint("someone/young@v9", tmp_path)
