"""Folders that are not fit to leave a machine, each for one reason."""

import json
import pickle
import shutil

import pytest
import tiny
import torch
from safetensors.torch import save_file

from modeling_querit.release import folder as release_folder
from modeling_querit.release.folder import files_of, problems_of


@pytest.fixture
def folder(saved_folders, tmp_path):
    return shutil.copytree(saved_folders("qwen3"), tmp_path / "reranker")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder, **changes):
    tensors = tiny.read_tensors(folder)
    for key, change in changes.items():
        key = key.replace("__", ".")
        tensors[key] = change(tensors[key])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_save_pretrained_writes_is_fit(saved_folder):
    assert problems_of(saved_folder) == []


def test_hidden_files_stay_here(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / ".DS_Store").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a")
    names = files_of(folder)
    assert "notes/a.txt" in names
    assert not any(name.startswith(".") for name in names)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "README.md", "modules.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert any(problem.startswith(f"{name} is missing") for problem in problems_of(folder))


@pytest.mark.parametrize(
    ("content", "named"), [("[]", "no object"), ('{"model_type": "querit", "auto_map": ["AutoModel"]}', "auto_map")]
)
def test_a_config_of_another_shape(folder, content, named):
    (folder / "config.json").write_text(content)
    assert any(problem.startswith("config.json") and named in problem for problem in problems_of(folder))


def test_a_config_without_auto_map_of_the_classifier(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    [problem] = problems_of(folder)
    assert "AutoModelForSequenceClassification" in problem


def test_code_that_auto_map_names_is_missing(folder):
    (folder / "modeling_querit.py").unlink()
    assert {problem.split(" ")[0] for problem in problems_of(folder)} == {"modeling_querit.py"}


def test_a_published_layout_is_to_be_converted(folder):
    change_config(folder, model_type="qwen3")
    [problem] = problems_of(folder)
    assert "'qwen3'" in problem


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    assert any("config.json cannot be read" in problem for problem in problems_of(folder))


def test_an_untrained_head(folder):
    change_tensors(folder, score__weight=torch.zeros_like)
    [problem] = problems_of(folder)
    assert "never trained" in problem


def test_an_export_is_no_folder_to_release(folder):
    change_tensors(folder, score__weight=lambda tensor: tensor[:1].clone())
    [problem] = problems_of(folder)
    assert problem.startswith("score.weight has 1 rows, not 2: this is an export")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none(folder, value):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    change_tensors(folder, model__layers__1__mlp__down_proj__weight=spoil)
    [problem] = problems_of(folder)
    assert problem.startswith("model.layers.1.mlp.down_proj.weight")


def test_infinities_that_cancel_out(folder):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0], tensor.view(-1)[1] = float("inf"), -float("inf")
        return tensor

    change_tensors(folder, model__norm__weight=spoil)
    assert len(problems_of(folder)) == 1


def test_weights_that_were_cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    [problem] = problems_of(folder)
    assert "model.safetensors is damaged" in problem


@pytest.mark.parametrize("name", ["optimizer.pt", "OPTIMIZER.PT", "pytorch_model.bin", "scores.npy", "notes.txt"])
def test_pickles_by_name_or_by_content(folder, name):
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    [problem] = problems_of(folder)
    assert problem.startswith(f"{name} may run code")


SECRETS = {
    "Hugging Face": "hf_" + "aB3" * 12,
    "GitHub": "ghp_" + "aB3" * 12,
    "API": "sk-proj-" + "aB3" * 12,
    "AWS": "AKIA" + "A1B2" * 4,
    "organization": "api_org_" + "aB3" * 12,
    "Google": "AIza" + "aB3xy" * 7,
    "GitLab": "glpat-" + "aB3" * 8,
    "Slack": "xoxb-" + "123-" * 4,
    "Face": "hf_oauth_" + "aB3" * 12,
    "AWS key": "aws_secret_access_key = " + "aB3/" * 10,
    "npm": "npm_" + "aB3" * 12,
    "PyPI": "pypi-" + "aB3" * 20,
    "signed": "eyJ" + "aB3" * 5 + ".eyJ" + "aB3" * 5 + "." + "aB3" * 5,
    "address": "https://me:hunter2@example.org/x",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets(folder, kind):
    (folder / "train.json").write_text(json.dumps({"args": {"token": SECRETS[kind]}}))
    [problem] = problems_of(folder)
    assert problem.startswith("train.json")
    assert kind in problem
    assert SECRETS[kind] not in problem


def test_secrets_in_the_header_of_weights(folder):
    tensors = tiny.read_tensors(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "token": SECRETS["GitHub"]})
    assert problems_of(folder) == ["model.safetensors holds what looks like a GitHub token."]


@pytest.mark.parametrize(
    "path",
    [
        "/home/user/data/rows.jsonl",
        "/root/x",
        "/mnt2/disk1/model",
        "/opt/x",
        "/fsx/me/model",
        "/dev/shm/x",
        "/workspaces/x/y",
        "file:///home/user/x",
        "at:/srv/x",
        "D:/models",
        "C:\\\\Users\\\\user",
        "/cluster/home/user/run",
        "/u/user/x",
        "/usr/local/x",
        "file:///etc/passwd",
        "~/runs/x",
        "~user/x",
        "c:/users/user",
        "\\\\\\\\server\\\\share",
    ],
)
def test_places_on_this_machine(folder, path):
    (folder / "train.json").write_text(f'{{"train": ["{path}"]}}')
    [problem] = problems_of(folder)
    assert problem.startswith("train.json names a place on this machine")


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/page",
        "https://opt/x",
        "a:/b",
        "../data/rows.jsonl",
        "and/or",
        "runs/home/x",
        "/start",
        "a / b",
        "/a b/c",
    ],
)
def test_what_is_no_place_on_this_machine(folder, text):
    (folder / "train.json").write_text(json.dumps({"train": [text]}))
    assert problems_of(folder) == []


def test_json_that_is_none(folder):
    (folder / "modules.json").write_text("[")
    assert any(problem.startswith("modules.json is no JSON") for problem in problems_of(folder))


@pytest.mark.parametrize(
    "name", ["extra.py", "code/modeling_querit.py", "lib.so", "x.pyc", "runs/events.out.tfevents.1"]
)
def test_what_a_release_has_no_use_for(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    [problem] = problems_of(folder)
    assert problem.startswith(name)
    assert problem.endswith("take it out.")


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "training.png", "figures/a.svg", "train.yaml"])
def test_what_may_lie_beside_a_model(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert problems_of(folder) == []


def test_weights_that_nobody_reads(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    [problem] = problems_of(folder)
    assert problem == "model-00001-of-00002.safetensors is not read by anybody who loads the folder: take it out."


def test_files_too_large_for_the_hub(folder, monkeypatch):
    monkeypatch.setattr(release_folder, "LARGEST_FILE", 10_000)
    assert any(problem.startswith("model.safetensors has") for problem in problems_of(folder))
