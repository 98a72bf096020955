"""Uploads to a local Hub by the real client: complete or not at all, with one-line errors."""

import json

import pytest
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants

from modeling_querit.release.hub import Destination, publish

REPO_ID = "someone/reranker"
CONFIG = {"model_type": "querit", "text_config": {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2}}
WEIGHTS = bytes(range(256)) * 500
LARGE = rf"^/lfs/{REPO_ID}/"


@pytest.fixture
def hub(online, monkeypatch):
    # The delays between retries are the client's.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer({"hf_good": "someone", "hf_other": "other"}, orgs={"someone": ["team"]}) as server:
        yield server


@pytest.fixture
def files(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(WEIGHTS)
    return {
        "README.md": b"---\nlicense: mit\n---\n# A reranker\n",
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": weights,
    }


def send(hub, files, token="hf_good", **where):
    destination = Destination(**{"repo_id": REPO_ID} | where)
    return publish(files, destination, "Upload", echo=lambda line: None, api=HfApi(endpoint=hub.url, token=token))


def held(hub, revision="main", name=REPO_ID):
    return {path: content for path, content in hub.repos[name].files(revision).items() if path != ".gitattributes"}


def contents(files):
    return {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in files.items()}


def test_all_files_are_published_in_one_commit(hub, files):
    lines = []
    api = HfApi(endpoint=hub.url, token="hf_good")
    commit = publish(files, Destination(REPO_ID, tag="v1"), "First", echo=lines.append, api=api)
    repo = hub.repos[REPO_ID]
    assert held(hub) == contents(files)
    assert [commit.title for commit in repo.history("main")][:1] == ["First"]
    assert repo.tags == {"v1": commit.oid}
    assert not repo.private
    assert lines[0] == "Logged in as someone."
    assert lines[-1] == "Downloaded and compared: all 3 files arrived unchanged."


def test_files_of_an_earlier_version_are_removed(hub, files):
    send(hub, files | {"model-00001-of-00002.safetensors": b"old", "old_querit.py": b"old"})
    send(hub, files)
    assert held(hub) == contents(files)


def test_publishing_again_changes_nothing(hub, files):
    first = send(hub, files, tag="v1")
    second = send(hub, files, tag="v1")
    assert second.oid == first.oid
    assert hub.count("PUT", LARGE) == 1


def test_files_beside_the_model_stay(hub, files):
    others = {"LICENSE": b"MIT", "curve.png": b"png", "notes/a.json": b"{}"}
    send(hub, files | others)
    send(hub, files)
    assert held(hub) == contents(files) | others


def test_removals_are_announced(hub, files):
    send(hub, files | {"old_querit.py": b"old"})
    lines = []
    publish(files, Destination(REPO_ID), "Again", echo=lines.append, api=HfApi(endpoint=hub.url, token="hf_good"))
    assert lines[1] == "Removing old_querit.py."


def test_a_repository_can_be_created_as_private(hub, files):
    send(hub, files, private=True)
    assert hub.repos[REPO_ID].private


def test_a_private_release_is_refused_by_a_public_repository(hub, files):
    send(hub, files)
    with pytest.raises(ValueError, match="is public: make it private"):
        send(hub, files | {"README.md": b"---\nlicense: mit\n---\n# Secret\n"}, private=True)
    assert held(hub) == contents(files)


def test_a_branch_is_created_and_written(hub, files):
    send(hub, files, revision="next")
    assert held(hub, "next") == contents(files)
    assert held(hub) == {}


def test_a_pull_request_leaves_the_branch_alone(hub, files):
    send(hub, files)
    changed = files | {"README.md": b"---\nlicense: mit\n---\n# Another\n"}
    commit = send(hub, changed, pr=True)
    assert commit.pr_url
    assert held(hub) == contents(files)
    assert held(hub, "refs/pr/1") == contents(changed)


def test_a_tag_of_an_earlier_commit_is_not_moved(hub, files):
    first = send(hub, files, tag="v1")
    send(hub, files | {"notes.txt": b"new"})
    with pytest.raises(ValueError, match="already has the tag v1"):
        send(hub, files | {"notes.txt": b"newer"}, tag="v1")
    assert hub.repos[REPO_ID].tags == {"v1": first.oid}
    # The error comes before anything is uploaded.
    assert held(hub)["notes.txt"] == b"new"


@pytest.mark.parametrize("changed", [{"notes.txt": b"new"}, {"model.safetensors": b"new"}, {"old_querit.py": None}])
def test_a_tag_of_the_last_commit_is_not_moved(hub, files, changed):
    first = send(hub, files | {"old_querit.py": b"old"}, tag="v1")
    wanted = {name: content for name, content in (files | {"old_querit.py": b"old"} | changed).items() if content}
    with pytest.raises(ValueError, match="already has the tag v1"):
        send(hub, wanted, tag="v1")
    assert hub.repos[REPO_ID].tags == {"v1": first.oid}
    assert hub.repos[REPO_ID].at().sha == first.oid


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"tag": "v 1"}, "is not a name of a tag"),
        ({"tag": ""}, "is not a name of a tag"),
        ({"tag": "main"}, "is not a name of a tag"),
        ({"tag": "v1..2"}, "is not a name of a tag"),
        ({"tag": "v1.lock"}, "is not a name of a tag"),
        ({"tag": "v1."}, "is not a name of a tag"),
        ({"tag": "v1", "pr": True}, "cannot be tagged before it is merged"),
        ({"repo_id": "reranker"}, "give OWNER/NAME"),
        ({"repo_id": "a/b c"}, "is not a name of a repository"),
        ({"revision": "x y"}, "is not a name of a branch"),
        ({"revision": "x..y"}, "is not a name of a branch"),
        ({"revision": "-x"}, "is not a name of a branch"),
        ({"revision": "x/"}, "is not a name of a branch"),
        ({"revision": ""}, "is not a name of a branch"),
    ],
)
def test_an_invalid_destination_is_refused(where, message):
    with pytest.raises(ValueError, match=message):
        Destination(**{"repo_id": REPO_ID} | where)


def test_a_repository_that_is_not_a_model_is_refused(hub, files):
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(REPO_ID)
    api.upload_file(path_or_fileobj=b"GGUF", path_in_repo="model.gguf", repo_id=REPO_ID)
    with pytest.raises(ValueError, match=r"holds model\.gguf, but no config\.json"):
        send(hub, files)
    assert held(hub) == {"model.gguf": b"GGUF"}


def test_a_plain_decoder_is_not_overwritten(hub, files):
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(REPO_ID)
    plain = CONFIG["text_config"] | {"architectures": ["Qwen3ForCausalLM"]}
    api.upload_file(path_or_fileobj=json.dumps(plain).encode(), path_in_repo="config.json", repo_id=REPO_ID)
    with pytest.raises(ValueError, match="holds a Qwen3ForCausalLM"):
        send(hub, files)


def test_a_published_reranker_is_replaced(hub, files):
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(REPO_ID)
    published = CONFIG["text_config"] | {"architectures": ["MLQwen3Model"]}
    api.upload_file(path_or_fileobj=json.dumps(published).encode(), path_in_repo="config.json", repo_id=REPO_ID)
    send(hub, files)
    assert held(hub) == contents(files)


def test_another_architecture_is_refused_before_the_upload(hub, files):
    send(hub, files)
    other = CONFIG | {"text_config": CONFIG["text_config"] | {"hidden_size": 64}}
    with pytest.raises(ValueError, match=r"hidden_size 32, this one has 64"):
        send(hub, files | {"config.json": json.dumps(other).encode()})
    assert held(hub) == contents(files)


def test_a_wrong_token_is_refused(hub, files):
    with pytest.raises(PermissionError, match="does not accept this token"):
        send(hub, files, token="hf_bad")


def test_a_missing_token_is_named(hub, files, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="There is no token"):
        send(hub, files, token=None)


def test_a_token_without_write_access_is_refused(hub, files):
    with pytest.raises(PermissionError, match=f"no write access to {REPO_ID}"):
        send(hub, files, token="hf_other")


@pytest.mark.parametrize("name", ["a/b/c", "someone/--", "someone/a b"])
def test_an_invalid_repository_name_is_refused(hub, files, name):
    with pytest.raises(ValueError, match="is not a name of a repository"):
        send(hub, files, repo_id=name)


STEPS = {
    "large file": ("PUT", LARGE),
    "batch": ("POST", "/info/lfs/objects/batch$"),
    "preupload": ("POST", "/preupload/main$"),
    "commit": ("POST", "/commit/main$"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": True}], ids=["refused", "cut"])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_upload_leaves_nothing_and_resumes(hub, files, step, fault):
    method, path = STEPS[step]
    hub.faults.append(Fault(method, path, times=1_000, **fault))
    with pytest.raises(ConnectionError, match="Run the same command again"):
        send(hub, files)
    assert held(hub) == {}
    hub.faults.clear()
    before = hub.count("PUT", LARGE)
    send(hub, files)
    assert held(hub) == contents(files)
    # Weights that had been uploaded are not sent again.
    assert hub.count("PUT", LARGE) == before + (0 if step == "commit" else 1)


def test_a_commit_whose_answer_is_lost_is_made_once(hub, files):
    hub.faults.append(Fault("POST", "/commit/main$", lost=True))
    with pytest.raises(ConnectionError, match="Run the same command again"):
        send(hub, files, tag="v1")
    commit = send(hub, files, tag="v1")
    assert hub.repos[REPO_ID].tags == {"v1": commit.oid}
    assert len(hub.repos[REPO_ID].history("main")) == 2


def test_a_concurrent_commit_is_an_error(hub, files):
    hub.faults.append(Fault("POST", "/commit/main$", status=412))
    with pytest.raises(ConnectionError, match="at the same time"):
        send(hub, files)


def test_a_rate_limit_is_named(hub, files):
    hub.faults.append(Fault("POST", "/commit/main$", times=1_000, status=429))
    with pytest.raises(ConnectionError, match=r"limits the rate of requests .* run the same command again later"):
        send(hub, files)


def test_a_card_that_the_hub_refuses_is_not_published(hub, files):
    hub.faults.append(Fault("POST", "/validate-yaml", status=400))
    with pytest.raises(ValueError, match=r"(?i)yaml|metadata|refused"):
        send(hub, files)
    assert held(hub) == {}


def test_downloaded_files_are_compared(hub, files, monkeypatch):
    send(hub, files)

    def corrupt(self, *args, **kwargs):
        folder = download(self, *args, **kwargs)
        with open(f"{folder}/model.safetensors", "ab") as file:
            file.write(b"!")
        return folder

    download = HfApi.snapshot_download
    monkeypatch.setattr(HfApi, "snapshot_download", corrupt)
    with pytest.raises(ValueError, match=r"model\.safetensors did not arrive unchanged"):
        send(hub, files | {"notes.txt": b"new"})
