"""Folders that are not fit for release, each for one reason."""

import json
import pickle
import shutil

import pytest
import tiny
import torch
from safetensors.torch import save_file

from modeling_querit.release import checks
from modeling_querit.release.checks import find_problems, visible_files


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


def test_a_folder_of_save_pretrained_is_fit(saved_folder):
    assert find_problems(saved_folder) == []


def test_hidden_files_are_not_released(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / ".DS_Store").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a")
    names = visible_files(folder)
    assert "notes/a.txt" in names
    assert not any(name.startswith(".") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "README.md", "modules.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert any(problem.startswith(f"{name} is missing") for problem in find_problems(folder))


@pytest.mark.parametrize(
    ("content", "named"),
    [("[]", "not a JSON object"), ('{"model_type": "querit", "auto_map": ["AutoModel"]}', "auto_map")],
)
def test_a_malformed_config_is_named(folder, content, named):
    (folder / "config.json").write_text(content)
    assert any(problem.startswith("config.json") and named in problem for problem in find_problems(folder))


def test_a_config_without_auto_map_of_the_classifier(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    [problem] = find_problems(folder)
    assert "AutoModelForSequenceClassification" in problem


def test_missing_code_of_the_auto_map_is_named(folder):
    (folder / "modeling_querit.py").unlink()
    assert {problem.split(" ")[0] for problem in find_problems(folder)} == {"modeling_querit.py"}


def test_a_published_layout_is_refused(folder):
    change_config(folder, model_type="qwen3")
    [problem] = find_problems(folder)
    assert "'qwen3'" in problem


def test_a_config_that_is_not_json_is_named(folder):
    (folder / "config.json").write_text("{")
    assert any("config.json cannot be read" in problem for problem in find_problems(folder))


def test_an_untrained_head_is_named(folder):
    change_tensors(folder, score__weight=torch.zeros_like)
    [problem] = find_problems(folder)
    assert "never trained" in problem


def test_a_sequence_classifier_is_refused(folder):
    change_tensors(folder, score__weight=lambda tensor: tensor[:1].clone())
    [problem] = find_problems(folder)
    assert problem.startswith("score.weight has 1 rows, not 2: this is a sequence classifier")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(folder, value):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    change_tensors(folder, model__layers__1__mlp__down_proj__weight=spoil)
    [problem] = find_problems(folder)
    assert problem.startswith("model.layers.1.mlp.down_proj.weight")


def test_infinities_that_cancel_out_are_found(folder):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0], tensor.view(-1)[1] = float("inf"), -float("inf")
        return tensor

    change_tensors(folder, model__norm__weight=spoil)
    assert len(find_problems(folder)) == 1


def test_truncated_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    [problem] = find_problems(folder)
    assert "model.safetensors is damaged" in problem


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "OPTIMIZER.PT", "pytorch_model.bin", "scores.npy", "notes.txt"])
def test_pickles_are_found_by_name_or_content(folder, name):
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    [problem] = find_problems(folder)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_and_not_printed(folder, kind):
    (folder / "train.json").write_text(json.dumps({"args": {"token": SECRETS[kind]}}))
    [problem] = find_problems(folder)
    assert problem.startswith("train.json")
    assert kind in problem
    assert SECRETS[kind] not in problem


def test_secrets_in_the_header_of_weights_are_found(folder):
    tensors = tiny.read_tensors(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "token": SECRETS["GitHub"]})
    assert find_problems(folder) == ["model.safetensors contains what looks like a GitHub token."]


@pytest.mark.slow
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
def test_local_paths_are_found(folder, path):
    (folder / "train.json").write_text(f'{{"train": ["{path}"]}}')
    [problem] = find_problems(folder)
    assert problem.startswith("train.json contains a path on this machine")


@pytest.mark.slow
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
def test_texts_that_are_not_local_paths_pass(folder, text):
    (folder / "train.json").write_text(json.dumps({"train": [text]}))
    assert find_problems(folder) == []


def test_malformed_json_is_named(folder):
    (folder / "modules.json").write_text("[")
    assert any(problem.startswith("modules.json is not JSON") for problem in find_problems(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["extra.py", "code/modeling_querit.py", "lib.so", "x.pyc", "runs/events.out.tfevents.1"]
)
def test_unexpected_files_are_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    [problem] = find_problems(folder)
    assert problem.startswith(name)
    assert problem.endswith("take it out.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "training.png", "plots/a.svg", "train.yaml"])
def test_licences_images_and_settings_may_be_released(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    assert find_problems(folder) == []


def test_unused_weights_are_named(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    [problem] = find_problems(folder)
    assert problem == "model-00001-of-00002.safetensors is not loaded by any runtime: take it out."


def test_files_too_large_for_the_hub_are_named(folder, monkeypatch):
    monkeypatch.setattr(checks, "MAX_FILE_BYTES", 10_000)
    assert any(problem.startswith("model.safetensors has") for problem in find_problems(folder))
