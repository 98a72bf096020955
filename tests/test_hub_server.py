"""The local Hub of the tests, used by the real client."""

import json
import subprocess
from pathlib import Path

import pytest
from hub_server import GITATTRIBUTES, Fault, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO_ID = "someone/model"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": bytes(range(256)) * 400,
    "nested/deeper/note.txt": b"a note\n" * 99,
    "nested/note with spaces.txt": "мысль".encode(),
}
LARGE = r"^/lfs/someone/model/\w{64}$"


@pytest.fixture
def hub(online):
    with HubServer({"hf_good": "someone", "hf_other": "other"}, orgs={"someone": ["team"]}) as server:
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_good")


@pytest.fixture
def repo(api, hub):
    api.create_repo(REPO_ID)
    return hub.repos[REPO_ID]


@pytest.fixture
def folder(tmp_path):
    for path, content in FILES.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content)
    return tmp_path / "model"


def read(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status(failed):
    return failed.value.response.status_code


def test_a_folder_is_uploaded_in_one_commit_and_downloaded(api, hub, repo, folder, tmp_path):
    info = api.upload_folder(repo_id=REPO_ID, folder_path=folder, commit_message="All of it")
    assert repo.files() == FILES | {".gitattributes": GITATTRIBUTES}
    assert [path for path, blob in repo.at().tree.items() if blob.lfs] == ["model.safetensors"]
    assert [commit.title for commit in repo.history()] == ["All of it", "initial commit"]
    assert info.oid == repo.branches["main"]
    assert info.repo_url.repo_id == REPO_ID

    api.create_tag(REPO_ID, tag="v1.0")
    with pytest.raises(HfHubHTTPError) as failed:
        api.create_tag(REPO_ID, tag="v1.0")
    assert status(failed) == 409
    api.create_tag(REPO_ID, tag="v1.0", exist_ok=True)
    api.upload_file(repo_id=REPO_ID, path_in_repo="config.json", path_or_fileobj=b'{"a": 1}')
    assert repo.tags == {"v1.0": info.oid}
    assert repo.files()["config.json"] == b'{"a": 1}'

    got = api.snapshot_download(REPO_ID, revision="v1.0", cache_dir=tmp_path / "hub")
    assert read(got) == repo.files("v1.0")
    assert Path(got).name == info.oid
    one = api.hf_hub_download(REPO_ID, "nested/note with spaces.txt", cache_dir=tmp_path / "again")
    assert Path(one).read_bytes() == FILES["nested/note with spaces.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO_ID, "nothing.txt", cache_dir=tmp_path / "again")


def test_repositories_are_listed(api, hub, repo, folder):
    api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    api.create_branch(REPO_ID, branch="old", revision=repo.history()[1].sha)
    assert api.repo_exists(REPO_ID)
    assert not api.repo_exists("someone/other")
    assert sorted(api.list_repo_files(REPO_ID)) == sorted(repo.files())
    assert api.list_repo_files(REPO_ID, revision="old") == [".gitattributes"]
    assert [entry.path for entry in api.list_repo_tree(REPO_ID, "nested")] == [
        "nested/deeper",
        "nested/note with spaces.txt",
    ]
    large, nested = api.get_paths_info(REPO_ID, ["model.safetensors", "nested", "nothing"])
    blob = repo.at().tree["model.safetensors"]
    assert (large.size, large.blob_id, large.lfs.sha256) == (len(blob.content), blob.oid, blob.sha256)
    assert nested.path == "nested"
    siblings = {sibling.rfilename: sibling for sibling in api.model_info(REPO_ID, files_metadata=True).siblings}
    assert siblings["model.safetensors"].lfs.sha256 == blob.sha256
    assert siblings["config.json"].blob_id == repo.at().tree["config.json"].oid
    assert api.model_info(REPO_ID, revision="old").sha == repo.branches["old"]
    refs = api.list_repo_refs(REPO_ID)
    assert {ref.name: ref.target_commit for ref in refs.branches} == repo.branches
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO_ID, revision="nothing")


def test_commits_delete_files_and_check_their_parent(api, repo, folder):
    first = api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    changes = [CommitOperationDelete("nested/"), CommitOperationDelete("empty.txt")]
    api.create_commit(REPO_ID, changes, commit_message="Less", parent_commit=first.oid)
    assert set(repo.files()) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    for code, arguments in [(412, {"parent_commit": first.oid}), (404, {"revision": "nothing"})]:
        with pytest.raises(HfHubHTTPError) as failed:
            api.upload_file(repo_id=REPO_ID, path_in_repo="late.txt", path_or_fileobj=b"late", **arguments)
        assert status(failed) == code


def test_known_and_ignored_files_are_not_committed(api, repo):
    api.upload_file(repo_id=REPO_ID, path_in_repo=".gitignore", path_or_fileobj=b"*.log\n")
    for _ in range(2):
        add = [CommitOperationAdd("logs/a.log", b"a"), CommitOperationAdd("a.txt", b"a")]
        api.create_commit(REPO_ID, add, commit_message="Twice")
    assert set(repo.files()) == {".gitattributes", ".gitignore", "a.txt"}


def test_a_pull_request_leaves_the_branch_alone(hub, repo):
    other = HfApi(endpoint=hub.url, token="hf_other")
    add = CommitOperationAdd("model.safetensors", b"weights")
    info = other.create_commit(REPO_ID, [add], commit_message="Please", create_pr=True)
    assert info.pr_url == f"{hub.url}/{REPO_ID}/discussions/1"
    assert repo.files("refs/pr/1") == {".gitattributes": GITATTRIBUTES, "model.safetensors": b"weights"}
    assert "model.safetensors" not in repo.files()
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.upload_file(repo_id=REPO_ID, path_in_repo="more.txt", path_or_fileobj=b"more", revision="refs/pr/1")
    assert repo.files("refs/pr/1")["more.txt"] == b"more"


def test_permissions_are_checked(api, hub, repo):
    wrong, other, nobody = (HfApi(endpoint=hub.url, token=token) for token in ("hf_bad", "hf_other", False))
    assert api.whoami()["name"] == "someone"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["team"]
    with pytest.raises(HfHubHTTPError) as failed:
        wrong.whoami()
    assert status(failed) == 401
    for refused, code in [(lambda: other.create_repo("someone/new"), 403), (lambda: api.create_repo(REPO_ID), 409)]:
        with pytest.raises(HfHubHTTPError) as failed:
            refused()
        assert status(failed) == code
    api.create_repo(REPO_ID, exist_ok=True)
    with pytest.raises(HfHubHTTPError) as failed:
        other.upload_file(repo_id=REPO_ID, path_in_repo="a", path_or_fileobj=b"a")
    assert status(failed) == 403
    api.create_repo("team/hidden", private=True)
    assert hub.repos["team/hidden"].private
    assert api.repo_exists("team/hidden")
    for client, code in [(other, 404), (nobody, 401)]:
        with pytest.raises(RepositoryNotFoundError) as failed:
            client.model_info("team/hidden")
        assert status(failed) == code
    assert nobody.model_info(REPO_ID).sha == repo.branches["main"]


def test_large_files_are_not_uploaded_twice(api, hub, repo, folder):
    hub.faults.append(Fault("POST", "/commit/main$"))
    with pytest.raises(HfHubHTTPError) as failed:
        api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    assert status(failed) == 503
    assert repo.files() == {".gitattributes": GITATTRIBUTES}
    api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    assert repo.files() == FILES | {".gitattributes": GITATTRIBUTES}
    assert hub.count("PUT", LARGE) == 1
    assert not hub.faults


def test_a_commit_whose_answer_is_lost_is_kept(api, hub, repo):
    hub.faults.append(Fault("POST", "/commit/main$", lost=True))
    with pytest.raises(Exception, match="disconnected without sending a response"):
        api.upload_file(repo_id=REPO_ID, path_in_repo="a", path_or_fileobj=b"a")
    assert repo.files()["a"] == b"a"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/preupload/main$"), ("PUT", LARGE)], ids=["preupload", "large file"]
)
@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": True}], ids=["refused", "cut"])
def test_the_client_retries(api, hub, repo, folder, method, path, fault):
    hub.faults.append(Fault(method, path, **fault))
    api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    assert repo.files() == FILES | {".gitattributes": GITATTRIBUTES}
    assert hub.count(method, path) == 2


@pytest.mark.slow
def test_a_broken_download_resumes(api, hub, repo, folder, tmp_path):
    api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    hub.faults.append(Fault("GET", "/resolve/.*/model.safetensors$", cut=True))
    got = api.hf_hub_download(REPO_ID, "model.safetensors", cache_dir=tmp_path / "hub")
    assert Path(got).read_bytes() == FILES["model.safetensors"]
    assert hub.count("GET", "/resolve/main/model.safetensors$") == 2
    hub.faults.append(Fault("GET", "/resolve/.*/config.json$", status=500, after=1, times=2))
    api.hf_hub_download(REPO_ID, "config.json", cache_dir=tmp_path / "hub")
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
        api.hf_hub_download(REPO_ID, "config.json", cache_dir=tmp_path / "other")
    assert [fault.times for fault in hub.faults] == [1]


@pytest.mark.slow
def test_a_fresh_process_needs_only_the_environment(hub, folder, forked_python, tmp_path):
    script = """
import json, sys
from huggingface_hub import create_repo, snapshot_download, upload_folder, whoami
url = create_repo("someone/model", private=True)
info = upload_folder(repo_id="someone/model", folder_path=sys.argv[1])
print(json.dumps([whoami()["name"], url, info.oid, snapshot_download("someone/model")]))
"""
    process = subprocess.run(
        [forked_python, "-c", script, str(folder)],
        env=hub.environment(tmp_path / "home", token="hf_good"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    name, url, oid, got = json.loads(process.stdout)
    assert (name, url, oid) == ("someone", f"{hub.url}/{REPO_ID}", hub.repos[REPO_ID].branches["main"])
    assert Path(got).is_relative_to(tmp_path / "home")
    assert read(got) == FILES | {".gitattributes": GITATTRIBUTES}
