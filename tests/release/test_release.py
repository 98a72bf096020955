"""`querit release` from end to end, against a local Hub, and what a fresh process loads from there."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hub_server import HubServer

from modeling_querit.files import write_json
from modeling_querit.release.reference_scores import REFERENCE_FILE, TOLERANCE, compute_reference

ROOT = Path(__file__).parents[2]
REPO_ID = "someone/reranker"
CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-ranking
base_model: someone/base
base_model_relation: finetune
language: [en]
tags: [reranker, querit]
---
# A reranker
"""

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_good": "someone"}) as server:
        yield server


@pytest.fixture(scope="module")
def complete_folder(saved_folders, tmp_path_factory):
    """A folder with a card and reference scores. Tests copy it before they change anything."""
    folder = shutil.copytree(saved_folders("deepseek_v3"), tmp_path_factory.mktemp("release") / "reranker")
    (folder / "README.md").write_text(CARD)
    write_json(compute_reference(folder), folder / REFERENCE_FILE)
    return folder


@pytest.fixture
def folder(complete_folder, tmp_path):
    return shutil.copytree(complete_folder, tmp_path / "reranker")


@pytest.fixture
def unpublished(querit):
    """Run `querit release` where it stops before the Hub: its exit code, and the lines of its errors."""

    def run(*arguments):
        code, _, err = querit("release", *arguments)
        return code, [line for line in err.splitlines() if line.startswith("querit: ")]

    return run


@pytest.fixture
def release(hub, forked_python, tmp_path):
    """Run `querit release` as a user who is logged in to the hub."""

    def run(*arguments, cwd=None):
        command = [forked_python, "-m", "modeling_querit", "release", *map(str, arguments)]
        environment = hub.environment(tmp_path / "home", "hf_good") | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_a_released_model_loads_by_its_name(hub, release, complete_folder, forked_python, tmp_path):
    """Checks, plan, dry run, upload; then a fresh process with an empty cache loads it from the Hub."""
    arguments = [complete_folder, "--repo-id", REPO_ID, "--tag", "v1.0"]
    dry_run = release(*arguments, "--dry-run")
    assert dry_run.returncode == 0, dry_run.stderr
    assert "model.safetensors" in dry_run.stdout
    assert REPO_ID not in hub.repos

    process = release(*arguments)
    assert process.returncode == 0, process.stderr
    assert "files arrived unchanged" in process.stdout.splitlines()[-2]
    repo = hub.repos[REPO_ID]
    local_files = {path.name: path.read_bytes() for path in complete_folder.iterdir()}
    assert {name: content for name, content in repo.files("v1.0").items() if name != ".gitattributes"} == local_files

    program = f"""
import json, sys
sys.modules["modeling_querit"] = None
from transformers import AutoModel
from sentence_transformers import CrossEncoder
pairs = [tuple(pair) for pair in json.loads(sys.argv[1])]
model = AutoModel.from_pretrained({REPO_ID!r}, trust_remote_code=True)
encoder = CrossEncoder({REPO_ID!r}, trust_remote_code=True, revision="v1.0", device="cpu")
print(json.dumps([model.predict(pairs).tolist(), encoder.predict(pairs).tolist()]))
"""
    reference = json.loads((complete_folder / REFERENCE_FILE).read_text())
    command = [forked_python, "-I", "-c", program, json.dumps(reference["pairs"])]
    environment = hub.environment(tmp_path / "empty")
    fresh = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    for scores in json.loads(fresh.stdout.splitlines()[-1]):
        assert scores == pytest.approx(reference["scores"], abs=TOLERANCE)


@pytest.mark.slow
def test_push_to_hub_publishes_the_same_folder(hub, saved_folders, forked_python, tmp_path):
    program = """
import sys
from modeling_querit import QueritForSequenceRanking
model = QueritForSequenceRanking.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
model.push_to_hub("someone/pushed")
"""
    command = [forked_python, "-c", program, str(saved_folders("qwen3")), str(tmp_path / "saved")]
    environment = hub.environment(tmp_path / "home", "hf_good") | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    pushed_files = hub.repos["someone/pushed"].files("main")
    saved_files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert pushed_files.keys() - {".gitattributes"} == saved_files.keys()
    # The card names the repository.
    assert [name for name, content in saved_files.items() if pushed_files[name] != content] == ["README.md"]


@pytest.mark.slow
def test_a_folder_of_the_working_directory_with_another_card(hub, release, folder, tmp_path):
    """Nothing is written to the folder; the reference scores that it lacks are published all the same."""
    reference = (folder / REFERENCE_FILE).read_bytes()
    (folder / REFERENCE_FILE).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "card.md").write_text(CARD.replace("A reranker", "{name}"))
    arguments = [folder.name, "--repo-id", "someone/relative", "--card", "card.md"]
    process = release(*arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    published_files = hub.repos["someone/relative"].files()
    assert json.loads(published_files[REFERENCE_FILE]) == json.loads(reference)
    assert b"# someone/relative" in published_files["README.md"]


@pytest.mark.slow
def test_upload_py_is_the_same_command(folder, forked_python):
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    command = [forked_python, str(ROOT / "upload.py"), str(folder), "--repo-id", REPO_ID]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "querit: optimizer.pt may run code when it is loaded" in process.stderr


def test_a_folder_that_is_not_fit_is_not_published(unpublished, folder):
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    (folder / "README.md").write_text("# nothing\n")
    code, problems = unpublished(folder, "--repo-id", "someone/unfit")
    assert code == 1
    assert any("optimizer.pt" in problem for problem in problems)
    assert any("license" in problem for problem in problems)


def test_a_card_with_a_secret_is_not_published(unpublished, folder, tmp_path):
    (tmp_path / "card.md").write_text(CARD + "\nTrained by hf_" + "aB3" * 12 + " in /home/someone/runs.\n")
    code, problems = unpublished(folder, "--repo-id", "someone/secret", "--card", tmp_path / "card.md")
    assert code == 1
    assert len(problems) == 2
    assert "a Hugging Face token" in problems[0]
    assert "/home/someone" in problems[1]


def test_a_template_that_was_not_filled_in_is_named(unpublished, folder):
    code, problems = unpublished(folder, "--repo-id", "someone/unfinished", "--card", "adapted")
    assert code == 1
    assert any("adapted.md still has TODO: fill it in" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere", ["--repo-id", REPO_ID], "nowhere is not a folder."),
        ("reranker", ["--repo-id", "reranker"], "give OWNER/NAME"),
        ("reranker", ["--repo-id", REPO_ID, "--card", "other"], "There is no card other: give a file, or one of"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(unpublished, folder, name, options, message):
    code, [line] = unpublished(folder.with_name(name), *options)
    assert code == 2
    assert message in line
