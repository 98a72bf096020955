import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from modeling_querit.files import jsonl_sha256, replacing, sha256, write_json, write_jsonl, writing_in


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("before")
    return path


def names(path):
    return [each.name for each in path.parent.iterdir()]


def test_what_was_there_stays_until_the_end(path):
    with replacing(path) as aside:
        aside.write_text("after")
        assert aside.parent == path.parent
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert names(path) == ["figures.json"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_after_an_error_everything_is_as_before(path, error):
    def fail():
        with replacing(path) as aside:
            aside.write_text("half of i")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert names(path) == ["figures.json"]


def test_folders_are_made(tmp_path):
    write_json({}, str(tmp_path / "a" / "b" / "c.json"))
    assert (tmp_path / "a" / "b" / "c.json").read_text() == "{}\n"


def test_a_file_that_was_not_written_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x.json"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_full_disk(path):
    path.with_name("figures.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"The disk is full: .*figures\.json could not be written.*make room") as caught:
        write_jsonl([{"a": 1}], path)
    assert caught.value.errno == 28
    assert path.read_text() == "before"
    assert names(path) == ["figures.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6400 vs 6292"),
    ],
)
def test_a_full_disk_in_the_words_of_libraries(tmp_path, error):
    def fail(error, folder):
        with writing_in(folder):
            raise error

    with pytest.raises(OSError, match=f"The disk is full: {tmp_path} could not be written") as caught:
        fail(error, tmp_path)
    assert caught.value.errno == 28
    # Said once already.
    with pytest.raises(OSError, match="full") as again:
        fail(caught.value, "elsewhere")
    assert again.value is caught.value


def test_other_errors_while_writing_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="another"), writing_in(tmp_path):
        raise RuntimeError("another")


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        write_json({}, tmp_path / "file" / "x.json")


def test_a_remainder_of_a_killed_process_is_no_obstacle(path):
    path.with_name("figures.json.part").write_text("half of something that is longer than what comes now")
    write_json([1], path)
    assert json.loads(path.read_text()) == [1]
    assert names(path) == ["figures.json"]


def test_json(path, tmp_path):
    write_json({"b": "é", "a": tmp_path}, path)
    assert path.read_text(encoding="utf-8") == f'{{\n  "b": "é",\n  "a": "{tmp_path}"\n}}\n'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=5))
def test_a_line_for_each_row(tmp_path, rows):
    write_jsonl(iter(rows), tmp_path / "rows.jsonl")
    *lines, last = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines] == rows
    assert last == b""


def test_rows_that_end_in_an_error_leave_what_was_there(path):
    def rows():
        yield {}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(rows(), path)
    with pytest.raises(TypeError):
        write_jsonl([object()], path)
    assert path.read_text() == "before"
    assert names(path) == ["figures.json"]


@given(st.binary())
def test_sha256(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_hash_of_rows_is_that_of_their_file(path):
    rows = [{"a": "ü"}, {"b": Path("c")}]
    write_jsonl(rows, path, default=str)
    assert jsonl_sha256(rows, default=str) == sha256(path)
    with pytest.raises(TypeError):
        jsonl_sha256(rows)
