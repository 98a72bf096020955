import json

import pytest
import torch

from benchmarks import shapes
from benchmarks.shapes import build_folder


@pytest.mark.slow
def test_a_folder_is_made_once(parent, monkeypatch):
    folder = build_folder("tiny_moe", 1, torch.bfloat16, parent, seed=1)
    monkeypatch.setattr(shapes, "_write_weights", None)
    assert build_folder("tiny_moe", 1, torch.bfloat16, parent, seed=1) == folder
    assert not [path for path in parent.iterdir() if path.name.startswith(".")]
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["num_hidden_layers"]) == ("bfloat16", 1)
