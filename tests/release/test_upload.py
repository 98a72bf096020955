"""upload.py from end to end, against a Hub of this machine, and what a stranger gets from there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants

from modeling_querit.checkpoints.parents import open_parent
from modeling_querit.files import write_json
from modeling_querit.release.reference import REFERENCE_FILE, TOLERANCE, check_scores, reference_of
from upload import run as run_upload

ROOT = Path(__file__).parents[2]
NAME = "someone/reranker"
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
def recorded(saved_folders, tmp_path_factory):
    """A folder with a card and recorded scores. Tests copy before they change anything."""
    folder = shutil.copytree(saved_folders("deepseek_v3"), tmp_path_factory.mktemp("release") / "reranker")
    (folder / "README.md").write_text(CARD)
    write_json(reference_of(folder), folder / REFERENCE_FILE)
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "reranker")


def recorded_in(folder):
    return json.loads((folder / REFERENCE_FILE).read_text())


def upload(hub, home, *arguments, cwd=None):
    command = [sys.executable, str(ROOT / "upload.py"), *map(str, arguments)]
    environment = hub.environment(home, "hf_good")
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def refused(capfd):
    """Runs upload.py where nothing gets as far as the Hub: its exit code, and the lines that it says."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            run_upload([str(each) for each in arguments])
        return stop.value.code, [line for line in capfd.readouterr().err.splitlines() if line.startswith("upload: ")]

    return run


def test_the_whole_way(hub, recorded, tmp_path):
    """Check, plan, dry run, upload; then a fresh process with an empty cache loads it by its name."""
    arguments = [recorded, "--repo-id", NAME, "--tag", "v1.0"]
    tried = upload(hub, tmp_path / "home", *arguments, "--dry-run")
    assert tried.returncode == 0, tried.stderr
    assert "model.safetensors" in tried.stdout
    assert NAME not in hub.repos

    done = upload(hub, tmp_path / "home", *arguments)
    assert done.returncode == 0, done.stderr
    assert "all" in done.stdout.splitlines()[-2]
    repo = hub.repos[NAME]
    sent = {path.name: path.read_bytes() for path in recorded.iterdir()}
    assert {name: content for name, content in repo.files("v1.0").items() if name != ".gitattributes"} == sent

    program = f"""
import json, sys
sys.modules["modeling_querit"] = None
from transformers import AutoModel
from sentence_transformers import CrossEncoder
pairs = [tuple(pair) for pair in json.loads(sys.argv[1])]
model = AutoModel.from_pretrained({NAME!r}, trust_remote_code=True)
encoder = CrossEncoder({NAME!r}, trust_remote_code=True, revision="v1.0", device="cpu")
print(json.dumps([model.predict(pairs).tolist(), encoder.predict(pairs).tolist()]))
"""
    record = json.loads((recorded / REFERENCE_FILE).read_text())
    command = [sys.executable, "-I", "-c", program, json.dumps(record["pairs"])]
    environment = hub.environment(tmp_path / "empty")
    fresh = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    for scores in json.loads(fresh.stdout.splitlines()[-1]):
        assert scores == pytest.approx(record["scores"], abs=TOLERANCE)


def test_push_to_hub_gives_the_same_folder(hub, saved_folders, tmp_path):
    program = """
import sys
from modeling_querit import QueritForSequenceRanking
model = QueritForSequenceRanking.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
model.push_to_hub("someone/pushed")
"""
    command = [sys.executable, "-c", program, str(saved_folders("qwen3")), str(tmp_path / "saved")]
    environment = hub.environment(tmp_path / "home", "hf_good") | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pushed = hub.repos["someone/pushed"].files("main")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert pushed.keys() - {".gitattributes"} == saved.keys()
    # The card names the repository.
    assert [name for name, content in saved.items() if pushed[name] != content] == ["README.md"]


def test_a_folder_that_is_not_fit_is_not_sent(hub, folder, tmp_path):
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    (folder / "README.md").write_text("# nothing\n")
    done = upload(hub, tmp_path / "home", folder, "--repo-id", "someone/unfit")
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("upload: ")]
    assert any("optimizer.pt" in line for line in told)
    assert any("license" in line for line in told)
    assert "Traceback" not in done.stderr
    assert "someone/unfit" not in hub.repos


def test_a_folder_by_its_name_alone_and_a_card_of_its_own(hub, folder, tmp_path):
    """Nothing is written into the folder; the scores that it lacks go up all the same."""
    reference = (folder / REFERENCE_FILE).read_bytes()
    (folder / REFERENCE_FILE).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "card.md").write_text(CARD.replace("A reranker", "{name}"))
    arguments = [folder.name, "--repo-id", "someone/relative", "--card", "card.md"]
    done = upload(hub, tmp_path / "home", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sent = hub.repos["someone/relative"].files()
    assert json.loads(sent[REFERENCE_FILE]) == json.loads(reference)
    assert b"# someone/relative" in sent["README.md"]


def test_a_card_with_a_secret_is_not_sent(refused, folder, tmp_path):
    (tmp_path / "card.md").write_text(CARD + "\nTrained by hf_" + "aB3" * 12 + " in /home/someone/runs.\n")
    code, told = refused(folder, "--repo-id", "someone/secret", "--card", tmp_path / "card.md")
    assert code == 1
    assert len(told) == 2
    assert "a Hugging Face token" in told[0]
    assert "/home/someone" in told[1]


def test_what_is_no_folder_is_one_line(refused, tmp_path):
    assert refused(tmp_path / "nowhere", "--repo-id", NAME) == (2, [f"upload: {tmp_path / 'nowhere'} is no folder."])


def test_a_stranger_gets_the_recorded_scores(recorded):
    assert check_scores(recorded, recorded_in(recorded)) == []


def test_weights_that_changed_since(folder):
    from safetensors.torch import save_file

    tensors = tiny.read_tensors(folder)
    tensors["score.bias"] = tensors["score.bias"] + tensors["score.bias"].new_tensor([0.0, 0.3])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    problems = check_scores(folder, recorded_in(folder))
    assert [problem.split(" ")[0] for problem in problems] == ["AutoModel", "CrossEncoder"]


def test_code_that_does_not_run_elsewhere(folder):
    code = (folder / "modeling_querit.py").read_text()
    (folder / "modeling_querit.py").write_text(f"import modeling_querit.files\n{code}")
    with pytest.raises(ValueError, match=r"does not load where this package is not installed"):
        check_scores(folder, recorded_in(folder))


def test_models_are_merged_by_their_names_on_the_hub(hub, online, recorded, tmp_path):
    home = tmp_path / "home"
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo("someone/parent")
    api.upload_folder(repo_id="someone/parent", folder_path=recorded)
    api.create_tag("someone/parent", tag="v1")
    api.delete_file("model.safetensors", repo_id="someone/parent")
    command = [
        sys.executable,
        "-m",
        "modeling_querit",
        "merge",
        "someone/parent@v1",
        str(recorded),
        "-o",
        str(tmp_path / "merged"),
    ]
    environment = hub.environment(home) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged, parent = tiny.read_tensors(tmp_path / "merged"), tiny.read_tensors(recorded)
    assert all(merged[key].equal(tensor) for key, tensor in parent.items())
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == ["someone/parent"]
    assert "- `someone/parent@v1`" in card.text
    # The record names the commit that was merged: the branch has moved on, and has no weights any more.
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    record["recipe"]["models"] = ["someone/parent", str(recorded)]
    (tmp_path / "merge.json").write_text(json.dumps(record))
    again = [*command[:4], "--recipe", str(tmp_path / "merge.json"), "-o", str(tmp_path / "again")]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"scores": [1.0]},
        {"pairs": [], "scores": []},
        {"pairs": [["a", "b"], ["a", "c"]], "scores": [0.5]},
        {"pairs": [["a", "b"]], "scores": ["high"]},
        {"pairs": ["ab"], "scores": [0.5]},
    ],
    ids=str,
)
def test_what_is_no_record_of_scores(tmp_path, record):
    with pytest.raises(ValueError, match=r"reference_scores.json is no record of pairs and their scores: delete it"):
        check_scores(tmp_path, record)


def test_a_revision_that_a_repository_does_not_have(hub, online, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    HfApi(endpoint=hub.url, token="hf_good").create_repo("someone/young")
    with pytest.raises(OSError, match=r"someone/young has no revision v9: name a branch, a tag or a commit\.$"):
        open_parent("someone/young@v9", tmp_path)
