"""Which model a name stands for, and names that may be published."""

import hashlib
import shutil

import pytest
from tiny_checkpoints import adapt

from modeling_querit.checkpoints.identity import identity_of, public_names


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


@pytest.fixture
def folders(tmp_path):
    """Make folders by their names; their paths."""

    def make(*names):
        for name in names:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return [str(tmp_path / name) for name in names]

    return make


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["runs/law", "runs/medicine"], ["law", "medicine"]),
        (["runs/law/model", "runs/medicine/model"], ["./law/model", "./medicine/model"]),
        (["runs/law/adapter", "runs/medicine"], ["./law/adapter", "medicine"]),
        (["a/runs/law", "b/runs/law", "c"], ["./a/runs/law", "./b/runs/law", "c"]),
        (["runs/law", "runs/law"], ["law", "law"]),
        (["runs/mini", "law"], ["./mini", "law"]),
    ],
)
def test_folders_are_named_by_the_ends_of_their_paths(folders, names, expected):
    assert public_names(folders(*names)) == expected


def test_names_of_repositories_stay_as_they_are(folders):
    assert public_names(["mini", "someone/law", *folders("law")]) == ["mini", "someone/law", "law"]


def test_relative_paths_are_resolved(folders, monkeypatch):
    (path,) = folders("runs/law")
    monkeypatch.chdir(path)
    assert public_names(["."]) == ["law"]
    assert public_names(["../law"]) == ["law"]


def test_the_root_has_a_name(folders):
    assert public_names(["/"]) == ["./"]
