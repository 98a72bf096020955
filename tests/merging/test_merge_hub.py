"""Merging models by their names on the Hub, and again from the record."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_good": "someone"}) as server:
        yield server


@pytest.mark.slow
def test_a_record_names_the_commit_that_was_merged(hub, online, saved_folders, forked_python, tmp_path):
    """Merging again works when the branch has moved on and has no weights any more."""
    folder = Path(shutil.copytree(saved_folders("deepseek_v3"), tmp_path / "reranker"))
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo("someone/parent")
    api.upload_folder(repo_id="someone/parent", folder_path=folder)
    api.create_tag("someone/parent", tag="v1")
    api.delete_file("model.safetensors", repo_id="someone/parent")

    def merge(destination, *arguments):
        command = [forked_python, "-m", "modeling_querit", "merge", *arguments, "-o", str(destination)]
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr

    merge(tmp_path / "merged", "someone/parent@v1", str(folder))
    merged_tensors, parent_tensors = tiny.read_tensors(tmp_path / "merged"), tiny.read_tensors(folder)
    assert all(merged_tensors[key].equal(tensor) for key, tensor in parent_tensors.items())
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == ["someone/parent"]
    assert "- `someone/parent@v1`" in card.text

    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    record["recipe"]["models"] = ["someone/parent", str(folder)]
    (tmp_path / "merge.json").write_text(json.dumps(record))
    merge(tmp_path / "again", "--recipe", str(tmp_path / "merge.json"))
    first, second = (tmp_path / name / "model.safetensors" for name in ("merged", "again"))
    assert first.read_bytes() == second.read_bytes()
