"""Models to be merged."""

import pytest
import torch
from tiny_parents import vary

from modeling_querit.checkpoints.merge import Recipe, merge_checkpoints


@pytest.fixture(scope="session")
def families(saved_folders, tmp_path_factory):
    """Three models of an architecture in one dtype, as folders. Tests copy before they change anything."""
    made = {}

    def get(architecture, dtype=torch.float32):
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp("family")
            made[architecture, dtype] = [
                vary(saved_folders(architecture), folder / name, seed, dtype)
                for seed, name in enumerate(["law", "medicine", "code"])
            ]
        return made[architecture, dtype]

    return get


@pytest.fixture
def family(families, architecture):
    return [str(folder) for folder in families(architecture)]


@pytest.fixture
def pair(families):
    """Two models of the smaller architecture, for what has nothing to do with it."""
    return [str(folder) for folder in families("qwen3")[:2]]


@pytest.fixture(scope="session")
def whole_merges(families, tmp_path_factory):
    """One merged folder per architecture. Tests copy before they change anything."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("merged") / "merged"
            merge_checkpoints(Recipe([str(each) for each in families(architecture)[:2]], t=["0.4"]), folder)
            made[architecture] = folder
        return made[architecture]

    return get


@pytest.fixture
def whole_merge(whole_merges, architecture):
    return whole_merges(architecture)
