import json
import subprocess
from importlib.metadata import version

import pytest

from modeling_querit import environment as module
from modeling_querit.environment import environment


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A function that runs git in a repository with one file, where the tests then stand."""
    repository = tmp_path / "repository"
    repository.mkdir()
    settings = {"HOME": tmp_path, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
    people = {f"GIT_{role}_{what}": "a" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for name, value in (settings | people).items():
        monkeypatch.setenv(name, str(value))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(repository)

    def run(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    run("init", "--quiet")
    (repository / "file").write_text("one")
    run("add", "file")
    return run


def test_versions_are_those_of_the_installed_packages():
    versions = environment()["versions"]
    for package in ("torch", "transformers", "tokenizers", "safetensors", "peft", "modeling-querit"):
        assert versions[package] == version(package)
    assert json.loads(json.dumps(versions)) == versions


def test_the_version_of_a_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package-of-ours"))
    assert environment()["versions"] == {"torch": version("torch"), "no-such-package-of-ours": None}


def test_the_revision_tells_of_modified_files(git):
    assert environment()["git_revision"] is None
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert environment()["git_revision"] == commit
    with open("file", "w") as file:
        file.write("two")
    assert environment()["git_revision"] == f"{commit}-dirty"
    git("commit", "--quiet", "-a", "-m", "two")
    assert environment()["git_revision"] == git("rev-parse", "HEAD") != commit


def test_an_untracked_file_is_not_a_modification(git):
    git("commit", "--quiet", "-m", "one")
    with open("other", "w") as file:
        file.write("")
    assert environment()["git_revision"] == git("rev-parse", "HEAD")


def test_a_revision_with_a_tag_is_still_found(git):
    git("commit", "--quiet", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    git("commit", "--quiet", "--allow-empty", "-m", "two")
    assert git("rev-parse", environment()["git_revision"]) == git("rev-parse", "HEAD")


def test_there_is_no_revision_outside_of_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment()["git_revision"] is None


def test_there_is_no_revision_without_git(git, monkeypatch, tmp_path):
    git("commit", "--quiet", "-m", "one")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git_revision"] is None
