"""Saving over an earlier save leaves nothing that would be loaded in its place; files have the modes of the umask."""

import json
import os
import shutil

import pytest
import tiny
import torch

from modeling_querit import QueritForSequenceRanking

INDEX = "model.safetensors.index.json"


@pytest.fixture
def changed(loaded):
    with torch.no_grad():
        loaded.score.weight.mul_(-1)
    return loaded


def weights_of(folder):
    return {path.name for path in folder.iterdir() if "safetensors" in path.name}


def check(folder, model):
    expected = model.predict(tiny.pairs()).tolist()
    assert QueritForSequenceRanking.from_pretrained(folder).predict(tiny.pairs()).tolist() == expected


def test_shards_over_one_file(saved_folder, changed, tmp_path):
    folder = shutil.copytree(saved_folder, tmp_path / "folder")
    changed.save_pretrained(folder, max_shard_size="40KB")
    shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert weights_of(folder) == shards | {INDEX}
    check(folder, changed)


def test_one_file_over_shards(loaded, tmp_path):
    loaded.save_pretrained(tmp_path, max_shard_size="40KB")
    with torch.no_grad():
        loaded.score.weight.mul_(-1)
    loaded.save_pretrained(tmp_path)
    assert weights_of(tmp_path) == {"model.safetensors"}
    check(tmp_path, loaded)


def test_few_shards_over_many(loaded, tmp_path):
    loaded.save_pretrained(tmp_path, max_shard_size="20KB")
    many = weights_of(tmp_path)
    loaded.save_pretrained(tmp_path, max_shard_size="70KB")
    shards = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    assert weights_of(tmp_path) == shards | {INDEX}
    assert len(many) > len(shards) + 1


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_files_are_as_readable_as_the_umask_says(loaded, tmp_path, umask, max_shard_size):
    before = os.umask(umask)
    try:
        loaded.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_other_files_of_a_user_stay(loaded, tmp_path):
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    (tmp_path / "model-notes.safetensors").write_bytes(b"mine")
    loaded.save_pretrained(tmp_path)
    assert {"notes.safetensors", "model-notes.safetensors"} <= weights_of(tmp_path)
