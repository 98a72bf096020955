import codecs
import errno
import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from modeling_querit.adaptation.corpus import read_corpus
from modeling_querit.adaptation.prompts import read_examples
from modeling_querit.files import (
    atomic_folder,
    atomic_write,
    explain_full_disk,
    jsonl_sha256,
    read_json,
    read_jsonl,
    read_lines,
    sha256,
    temporary_folder,
    write_json,
    write_jsonl,
)
from modeling_querit.rejects import Rejects
from modeling_querit.retrieval.collection import Collection, read_documents
from modeling_querit.retrieval.runs import read_run
from modeling_querit.settings_files import read_settings
from modeling_querit.training.data import read_rows
from modeling_querit.training.prepare import stream_rows


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("before")
    return path


def names(path):
    return [sibling.name for sibling in path.parent.iterdir()]


def test_the_previous_file_stays_until_the_new_one_is_complete(path):
    with atomic_write(path) as temporary:
        temporary.write_text("after")
        assert temporary.parent == path.parent
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert names(path) == ["metrics.json"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_previous_file(path, error):
    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half of i")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert names(path) == ["metrics.json"]


def test_missing_folders_are_made(tmp_path):
    write_json({}, str(tmp_path / "a" / "b" / "c.json"))
    assert (tmp_path / "a" / "b" / "c.json").read_text() == "{}\n"


def test_a_block_that_writes_nothing_makes_no_file(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "x.json"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_named(path):
    path.with_name("metrics.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"The disk is full: .*metrics\.json .*free some space") as caught:
        write_jsonl([{"a": 1}], path)
    assert caught.value.errno == 28
    assert path.read_text() == "before"
    assert names(path) == ["metrics.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6400 vs 6292"),
    ],
)
def test_a_full_disk_that_a_library_reports(tmp_path, error):
    def fail(error, folder):
        with explain_full_disk(folder):
            raise error

    with pytest.raises(OSError, match=f"The disk is full: {tmp_path} could not be written") as caught:
        fail(error, tmp_path)
    assert caught.value.errno == 28
    # The message is not repeated.
    with pytest.raises(OSError, match="full") as again:
        fail(caught.value, "elsewhere")
    assert again.value is caught.value


def test_other_errors_of_libraries_are_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="another"), explain_full_disk(tmp_path):
        raise RuntimeError("another")


def test_other_errors_of_the_system_are_unchanged(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        write_json({}, tmp_path / "file" / "x.json")


def test_the_temporary_file_of_a_killed_process_is_overwritten(path):
    path.with_name("metrics.json.part").write_text("half of something that is longer than what comes now")
    write_json([1], path)
    assert json.loads(path.read_text()) == [1]
    assert names(path) == ["metrics.json"]


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_numbers_that_json_does_not_have_are_strings_in_files_and_null_in_rows(path, value, text):
    write_json({"value": [value, "NaN"]}, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"value": [text, "NaN"]}
    write_jsonl([{"text": "NaN, Infinity", "value": [value, 1.5]}], path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"text": "NaN, Infinity", "value": [None, 1.5]}
    assert jsonl_sha256([{"text": "NaN, Infinity", "value": [value, 1.5]}]) == sha256(path)


def test_json_is_indented_and_unknown_values_are_strings(path, tmp_path):
    write_json({"b": "é", "a": tmp_path}, path)
    assert path.read_text(encoding="utf-8") == f'{{\n  "b": "é",\n  "a": "{tmp_path}"\n}}\n'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(st.lists(JSON, max_size=5))
def test_each_row_is_a_line(tmp_path, rows):
    write_jsonl(iter(rows), tmp_path / "rows.jsonl")
    *lines, last = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines] == rows
    assert last == b""


def test_rows_that_raise_leave_the_previous_file(path):
    def rows():
        yield {}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(rows(), path)
    with pytest.raises(TypeError):
        write_jsonl([object()], path)
    assert path.read_text() == "before"
    assert names(path) == ["metrics.json"]


@given(st.binary())
def test_sha256_of_a_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_hash_of_rows_is_that_of_their_file(path):
    rows = [{"a": "ü"}, {"b": Path("c")}]
    write_jsonl(rows, path, default=str)
    assert jsonl_sha256(rows, default=str) == sha256(path)
    with pytest.raises(TypeError):
        jsonl_sha256(rows)


@pytest.mark.slow
@given(st.lists(JSON, max_size=5))
def test_rows_are_read_as_they_were_written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    # A list in the first line would be that of a JSON array.
    rows = [{}, *rows]
    write_jsonl(rows, path)
    expected = [(f"{path}, line {number}", row) for number, row in enumerate(rows, start=1)]
    assert list(read_jsonl(path)) == expected
    zipped = path.with_name("zipped.jsonl.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in read_jsonl(zipped)] == rows


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf1\r\n \n\n2")
    assert list(read_jsonl(path)) == [(f"{path}, line 1", 1), (f"{path}, line 4", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "rows.jsonl, line 2: Expecting"),
        (b'"\xff"', "rows.jsonl, line 2: .*; save it as UTF-8"),
        (b"[" * 99_999, "line 2"),
    ],
    ids=["broken", "latin-1", "deep"],
)
def test_a_broken_line_is_named_or_handed_over(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"1\n" + line + b"\n3\n")
    with pytest.raises(ValueError, match=message):
        list(read_jsonl(path))
    errors = []
    rows = [row for _, row in read_jsonl(path, on_error=lambda error, line: errors.append((str(error), line)))]
    assert rows == [1, 3]
    ((error, raw_line),) = errors
    assert f"{path}, line 2: " in error
    assert raw_line == line


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"1\n", lambda data: data[:20] + bytes(30)])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b"1\n2\n" * 1000)))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is cut off after line \d+, or is not a gzip file"):
        list(read_jsonl(path))


def test_lines_of_an_open_file_have_the_name_that_is_given(path):
    with path.open("rb") as file:
        assert list(read_lines(file, "standard input")) == [("standard input, line 1", b"before")]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        next(read_lines(path.with_name("nowhere")))


# Limits other than the disk


@pytest.mark.parametrize(
    ("error", "number", "reason"),
    [
        (OSError(errno.EFBIG, "File too large"), errno.EFBIG, "A file would exceed the limit of its size"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT, "The disk quota is used up"),
        (ValueError("I/O error: File too large (os error 27)"), errno.EFBIG, "A file would exceed the limit"),
        (ValueError("I/O error: Disk quota exceeded (os error 122)"), errno.EDQUOT, "The disk quota is used up"),
        (ValueError("I/O error: No space left on device (os error 28)"), errno.ENOSPC, "The disk is full"),
    ],
)
def test_a_limit_while_a_folder_is_written_is_one_sentence(tmp_path, error, number, reason):
    with pytest.raises(OSError, match=f"{reason}.*new could not be written") as raised, atomic_folder(tmp_path / "new"):
        raise error
    assert raised.value.errno == number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_larger_than_the_limit_is_named(tmp_path):
    """By the limit itself, in a process of its own."""
    code = (
        "import resource, sys; from pathlib import Path; import torch; from safetensors.torch import save_file\n"
        "from modeling_querit.files import atomic_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "        save_file({'a': torch.ones(10000)}, folder / 'model.safetensors')\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "A file would exceed the limit of its size" in out
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_of_living_processes_are_left_alone(tmp_path):
    with temporary_folder(tmp_path, ".base-") as first:
        (first / "part").write_text("x")
        with temporary_folder(tmp_path, ".base-"):
            assert (first / "part").exists()
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".base-killed").mkdir()
    (tmp_path / ".base-killed" / ".lock").write_text("")
    with temporary_folder(tmp_path, ".base-"):
        assert not (tmp_path / ".base-killed").exists()


def read_collection(path):
    """Documents and queries of a collection whose files have the content of `path`."""
    folder = path.parent / "collection"
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(path)
    (folder / "qrels" / "test.tsv").write_text("a\ta\t1\n")
    collection = Collection.load(folder, "test")
    return list(collection.documents), list(collection.queries)


ROW = '{"_id": "a", "text": "fox", "query": "fox", "documents": ["fox"], "labels": [1]}'
# Every reader of files that users give, by the name of the file, with a content that it reads.
READERS = {
    "read_jsonl": (lambda path: list(read_jsonl(path)), "rows.jsonl", ROW),
    "rows of train": (lambda path: list(read_rows(path)), "rows.jsonl", ROW),
    "rows of train, lenient": (lambda path: list(read_rows(path, Rejects(None))), "rows.jsonl", ROW),
    "documents of rerank": (lambda path: read_documents(str(path)), "rows.jsonl", ROW),
    "texts of rerank": (lambda path: read_documents(str(path)), "rows.txt", "fox"),
    "corpus of adapt": (lambda path: list(read_corpus([str(path)], Counter())), "rows.jsonl", ROW),
    "collection": (read_collection, "rows.jsonl", ROW),
    "examples of queries": (read_examples, "queries.txt", "fox"),
    "TREC run": (read_run, "first.run", "q Q0 d 1 0.5 tag"),
    "settings": (read_settings, "config.yaml", "model: mini"),
    "recipe": (read_settings, "recipe.json", '{"models": ["a", "b"]}'),
    "JSON": (read_json, "results.json", '{"rows": []}'),
}


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    function, name, content = READERS[request.param]
    return function, tmp_path / name, content


def test_every_reader_ignores_a_byte_order_mark(reader):
    read, path, content = reader
    path.write_bytes(content.encode())
    expected = read(path)
    path.write_bytes(codecs.BOM_UTF8 + content.encode())
    assert read(path) == expected != []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_every_reader_refuses_utf16(reader, encoding):
    """Line by line, JSON would guess the encoding of the first one, and read 9 of 10."""
    read, path, content = reader
    path.write_bytes(f"{content}\n{content}\n".encode(encoding))
    with pytest.raises(ValueError, match=r"\w+\.\w+ is in UTF-16 or UTF-32, or no text: save it as UTF-8\.$"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x", mtime=0), r"a gzip file: give it a name that ends in \.gz"),
        (b"PK\x03\x04 xlsx", "a zip file or an office document"),
        (b"PAR1 table", "a parquet file"),
        (b"%PDF-1.7", "a PDF: extract its text"),
    ],
    ids=["gzip", "zip", "parquet", "pdf"],
)
def test_every_reader_names_files_that_are_no_text(reader, content, message):
    read, path, _ = reader
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"\w+\.\w+ is {message}"):
        read(path)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_every_reader_refuses_devices_and_folders(reader, tmp_path, name):
    read, path, _ = reader
    path.symlink_to(name)
    with pytest.raises(OSError, match=r"is a device, not a file|no such file"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"is a folder|no such file|has no corpus"):
        read(path)


@pytest.mark.parametrize("content", ["[\n{},\n{}\n]", "[{},\n{}]", '["a", "b"]', "{\n}\n", " [\n{}]"])
def test_json_that_is_no_jsonl_is_refused_as_a_whole(tmp_path, content):
    """Its last lines would be rows: one of ten."""
    path = tmp_path / "rows.json"
    path.write_text(content.replace("{}", ROW))
    for read in (lambda: list(read_rows(path, Rejects(None))), lambda: read_documents(str(path))):
        with pytest.raises(
            ValueError, match=r"rows\.json is (a JSON array|JSON over several lines): write one object per"
        ):
            read()


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_querit.files._MAX_LINE_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "' + b"x" * 2000 + b'"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is longer than"):
        list(read_jsonl(tmp_path / "rows.jsonl"))


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("fox\nhen\n"))
    thread.start()
    assert read_documents(str(tmp_path / "pipe")) == ["fox", "hen"]
    thread.join()


def test_a_table_is_no_list_of_documents(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n1,fox\n")
    with pytest.raises(ValueError, match=r"rows\.csv is a table: write its texts one per line"):
        read_documents(str(tmp_path / "rows.csv"))
    assert read_documents(str(tmp_path / "rows.csv"), is_jsonl=False) == ["id,text", "1,fox"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "./nowhere.csv", "/nowhere/rows"])
def test_rows_of_another_kind_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("query,document\n")
    (tmp_path / "rows.tsv").write_text("query,document\n")
    with pytest.raises(ValueError, match=r"(is no file of rows|does not exist): give \.jsonl, \.json or \.parquet"):
        list(stream_rows([name], None, 0))
