"""Uploads to a Hub of this machine, by the real client: whole or not at all, and told in one line."""

import json

import pytest
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants

from modeling_querit.release.publish import Destination, publish

NAME = "someone/reranker"
CONFIG = {"model_type": "querit", "text_config": {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2}}
WEIGHTS = bytes(range(256)) * 500
LARGE = rf"^/lfs/{NAME}/"


@pytest.fixture
def hub(online, monkeypatch):
    # Waiting is the client's matter, and tested there.
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
    destination = Destination(**{"repo_id": NAME} | where)
    return publish(files, destination, "Upload", echo=lambda line: None, api=HfApi(endpoint=hub.url, token=token))


def held(hub, revision="main", name=NAME):
    return {path: content for path, content in hub.repos[name].files(revision).items() if path != ".gitattributes"}


def contents(files):
    return {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in files.items()}


def test_everything_in_one_commit(hub, files):
    said = []
    api = HfApi(endpoint=hub.url, token="hf_good")
    commit = publish(files, Destination(NAME, tag="v1"), "First", echo=said.append, api=api)
    repo = hub.repos[NAME]
    assert held(hub) == contents(files)
    assert [each.title for each in repo.history("main")][:1] == ["First"]
    assert repo.tags == {"v1": commit.oid}
    assert not repo.private
    assert said[0] == "Logged in as someone."
    assert said[-1] == "Downloaded it again: all 3 files are what was sent."


def test_what_the_new_version_does_not_have_is_gone(hub, files):
    send(hub, files | {"model-00001-of-00002.safetensors": b"old", "old_querit.py": b"old"})
    send(hub, files)
    assert held(hub) == contents(files)


def test_the_same_again_changes_nothing(hub, files):
    first = send(hub, files, tag="v1")
    second = send(hub, files, tag="v1")
    assert second.oid == first.oid
    assert hub.count("PUT", LARGE) == 1


def test_what_is_not_of_the_model_stays(hub, files):
    others = {"LICENSE": b"MIT", "curve.png": b"png", "notes/a.json": b"{}"}
    send(hub, files | others)
    send(hub, files)
    assert held(hub) == contents(files) | others


def test_what_is_removed_is_told_before(hub, files):
    send(hub, files | {"old_querit.py": b"old"})
    said = []
    publish(files, Destination(NAME), "Again", echo=said.append, api=HfApi(endpoint=hub.url, token="hf_good"))
    assert said[1] == "Removes old_querit.py."


def test_private(hub, files):
    send(hub, files, private=True)
    assert hub.repos[NAME].private


def test_a_public_repository_does_not_get_what_is_private(hub, files):
    send(hub, files)
    with pytest.raises(ValueError, match="is public already"):
        send(hub, files | {"README.md": b"---\nlicense: mit\n---\n# Secret\n"}, private=True)
    assert held(hub) == contents(files)


def test_a_branch(hub, files):
    send(hub, files, revision="next")
    assert held(hub, "next") == contents(files)
    assert held(hub) == {}


def test_a_pull_request(hub, files):
    send(hub, files)
    changed = files | {"README.md": b"---\nlicense: mit\n---\n# Another\n"}
    commit = send(hub, changed, pr=True)
    assert commit.pr_url
    assert held(hub) == contents(files)
    assert held(hub, "refs/pr/1") == contents(changed)


def test_a_tag_that_is_taken(hub, files):
    first = send(hub, files, tag="v1")
    send(hub, files | {"notes.txt": b"new"})
    with pytest.raises(ValueError, match="has a tag v1 already"):
        send(hub, files | {"notes.txt": b"newer"}, tag="v1")
    assert hub.repos[NAME].tags == {"v1": first.oid}
    # It was told before anything was sent.
    assert held(hub)["notes.txt"] == b"new"


@pytest.mark.parametrize("changed", [{"notes.txt": b"new"}, {"model.safetensors": b"new"}, {"old_querit.py": None}])
def test_a_tag_on_the_head_is_not_moved_and_told_before_anything_is_sent(hub, files, changed):
    first = send(hub, files | {"old_querit.py": b"old"}, tag="v1")
    wanted = {name: content for name, content in (files | {"old_querit.py": b"old"} | changed).items() if content}
    with pytest.raises(ValueError, match="has a tag v1 already"):
        send(hub, wanted, tag="v1")
    assert hub.repos[NAME].tags == {"v1": first.oid}
    assert hub.repos[NAME].at().sha == first.oid


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"tag": "v 1"}, "is no name of a tag"),
        ({"tag": ""}, "is no name of a tag"),
        ({"tag": "main"}, "is no name of a tag"),
        ({"tag": "v1..2"}, "is no name of a tag"),
        ({"tag": "v1.lock"}, "is no name of a tag"),
        ({"tag": "v1."}, "is no name of a tag"),
        ({"tag": "v1", "pr": True}, "once it is merged"),
        ({"repo_id": "reranker"}, "give OWNER/NAME"),
        ({"repo_id": "a/b c"}, "is no name of a repository"),
        ({"revision": "x y"}, "is no name of a branch"),
        ({"revision": "x..y"}, "is no name of a branch"),
        ({"revision": "-x"}, "is no name of a branch"),
        ({"revision": "x/"}, "is no name of a branch"),
        ({"revision": ""}, "is no name of a branch"),
    ],
)
def test_what_cannot_be_meant(where, message):
    with pytest.raises(ValueError, match=message):
        Destination(**{"repo_id": NAME} | where)


def test_a_repository_for_something_else(hub, files):
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(NAME)
    api.upload_file(path_or_fileobj=b"GGUF", path_in_repo="model.gguf", repo_id=NAME)
    with pytest.raises(ValueError, match=r"holds model\.gguf, but no config\.json"):
        send(hub, files)
    assert held(hub) == {"model.gguf": b"GGUF"}


def test_a_plain_decoder_is_not_overwritten(hub, files):
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(NAME)
    plain = CONFIG["text_config"] | {"architectures": ["Qwen3ForCausalLM"]}
    api.upload_file(path_or_fileobj=json.dumps(plain).encode(), path_in_repo="config.json", repo_id=NAME)
    with pytest.raises(ValueError, match="holds a Qwen3ForCausalLM"):
        send(hub, files)


def test_a_published_reranker_is_a_version_of_ours(hub, files):
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo(NAME)
    published = CONFIG["text_config"] | {"architectures": ["MLQwen3Model"]}
    api.upload_file(path_or_fileobj=json.dumps(published).encode(), path_in_repo="config.json", repo_id=NAME)
    send(hub, files)
    assert held(hub) == contents(files)


def test_another_architecture_is_refused_before_anything_is_sent(hub, files):
    send(hub, files)
    other = CONFIG | {"text_config": CONFIG["text_config"] | {"hidden_size": 64}}
    with pytest.raises(ValueError, match=r"hidden_size 32, this one has 64"):
        send(hub, files | {"config.json": json.dumps(other).encode()})
    assert held(hub) == contents(files)


def test_a_wrong_token(hub, files):
    with pytest.raises(PermissionError, match="does not accept this token"):
        send(hub, files, token="hf_bad")


def test_no_token(hub, files, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="There is no token"):
        send(hub, files, token=None)


def test_no_right(hub, files):
    with pytest.raises(PermissionError, match=f"may not write to {NAME}"):
        send(hub, files, token="hf_other")


@pytest.mark.parametrize("name", ["a/b/c", "someone/--", "someone/a b"])
def test_what_is_no_name(hub, files, name):
    with pytest.raises(ValueError, match="is no name of a repository"):
        send(hub, files, repo_id=name)


STEPS = {
    "large file": ("PUT", LARGE),
    "batch": ("POST", "/info/lfs/objects/batch$"),
    "preupload": ("POST", "/preupload/main$"),
    "commit": ("POST", "/commit/main$"),
}


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": True}], ids=["refused", "cut"])
@pytest.mark.parametrize("step", STEPS)
def test_what_breaks_off_leaves_nothing_half_and_goes_on(hub, files, step, fault):
    method, path = STEPS[step]
    hub.faults.append(Fault(method, path, times=1_000, **fault))
    with pytest.raises(ConnectionError, match="Give the same command again"):
        send(hub, files)
    assert held(hub) == {}
    hub.faults.clear()
    before = hub.count("PUT", LARGE)
    send(hub, files)
    assert held(hub) == contents(files)
    # Weights that had arrived were not sent again.
    assert hub.count("PUT", LARGE) == before + (0 if step == "commit" else 1)


def test_a_commit_whose_answer_is_lost(hub, files):
    hub.faults.append(Fault("POST", "/commit/main$", lost=True))
    with pytest.raises(ConnectionError, match="Give the same command again"):
        send(hub, files, tag="v1")
    commit = send(hub, files, tag="v1")
    assert hub.repos[NAME].tags == {"v1": commit.oid}
    assert len(hub.repos[NAME].history("main")) == 2


def test_somebody_else_wrote_meanwhile(hub, files):
    hub.faults.append(Fault("POST", "/commit/main$", status=412))
    with pytest.raises(ConnectionError, match="at the same time"):
        send(hub, files)


def test_a_hub_that_has_had_enough_for_now(hub, files):
    hub.faults.append(Fault("POST", "/commit/main$", times=1_000, status=429))
    with pytest.raises(ConnectionError, match=r"asks to wait .* give the same command again"):
        send(hub, files)


def test_a_card_the_hub_refuses(hub, files):
    hub.faults.append(Fault("POST", "/validate-yaml", status=400))
    with pytest.raises(ValueError, match=r"(?i)yaml|metadata|refused"):
        send(hub, files)
    assert held(hub) == {}


def test_what_arrived_is_compared(hub, files, monkeypatch):
    send(hub, files)

    def other(self, *args, **kwargs):
        folder = download(self, *args, **kwargs)
        with open(f"{folder}/model.safetensors", "ab") as file:
            file.write(b"!")
        return folder

    download = HfApi.snapshot_download
    monkeypatch.setattr(HfApi, "snapshot_download", other)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was sent"):
        send(hub, files | {"notes.txt": b"new"})
