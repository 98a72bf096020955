"""The mini's cache: shared, read-only, and used by several processes at once; without assembling the mini."""

import os
import shutil
from pathlib import Path

import pytest

from modeling_querit.cards import NOTICE_FILE
from modeling_querit.checkpoints import mini
from modeling_querit.files import temporary_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(mini, "_cache", lambda: tmp_path)
    monkeypatch.setattr(mini, "_fingerprint", lambda: "0")
    return tmp_path


@pytest.fixture
def folder(cache):
    """The folder of a mini of an earlier version."""
    folder = cache / "mini-0"
    folder.mkdir()
    for path in Path(mini.__file__).parents[1].glob("*_querit.py"):
        shutil.copyfile(path, folder / path.name)
    (folder / "loss_querit.py").write_text("old")
    return folder


def test_code_and_notice_are_updated(folder):
    assert mini.default_model_path() == folder
    assert (folder / "loss_querit.py").read_text() != "old"
    assert "Gemma Terms of Use" in (folder / NOTICE_FILE).read_text()


def test_a_read_only_cache_is_used_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(mini, "FileLock", forbidden)
    assert mini.default_model_path() == folder
    assert (folder / "loss_querit.py").read_text() == "old"


def test_the_lock_of_another_user_does_not_matter_to_a_complete_folder(folder, monkeypatch):
    monkeypatch.setattr(mini, "FileLock", forbidden)
    assert mini.default_model_path() == folder


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch):
    monkeypatch.setattr(mini, "FileLock", forbidden)
    with pytest.raises(PermissionError, match="cannot be written: set HF_ASSETS_CACHE"):
        mini.default_model_path()


def forbidden(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_the_assembly_leaves_the_folders_of_other_processes_alone(cache, monkeypatch):
    monkeypatch.setattr(mini, "base_model", lambda: pytest.fail("stop here"))
    with temporary_folder(cache, ".base-") as other:
        with pytest.raises(pytest.fail.Exception, match="stop here"):
            mini._assemble(cache / "mini-0")
        assert other.exists()
