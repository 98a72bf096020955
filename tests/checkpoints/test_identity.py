"""Which model a name stands for."""

import hashlib
import shutil

from tiny_checkpoints import adapt

from modeling_querit.checkpoints.identity import identity_of


def test_a_folder_is_identified_by_the_hashes_of_its_files(saved_folders, tmp_path):
    folder = saved_folders("qwen3")
    identity = identity_of(str(folder))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert identity["model.safetensors"] == weights
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < identity.keys()
    assert "README.md" not in identity
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert identity_of(str(copy)) == identity
    (copy / "chat_template.jinja").write_text("another")
    assert identity_of(str(copy)) != identity


def test_the_identity_of_an_adapter_includes_its_base(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    identity = identity_of(str(tmp_path / "adapter"))
    assert identity["base"] == identity_of(str(saved_folders("qwen3")))
    assert "adapter_model.safetensors" in identity
