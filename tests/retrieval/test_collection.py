import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from modeling_querit.retrieval.collection import Collection, Source, read_documents


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "Fox", "text": "red"}\n{"_id": "d2", "text": "grey"}\n', encoding="utf-8"
    )
    queries = [{"_id": "q1", "text": "which fox"}, {"_id": "q2", "text": "unjudged"}]
    with gzip.open(tmp_path / "queries.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(query) + "\n" for query in queries)
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return tmp_path


def test_reads_the_layout_gzipped_or_not(folder):
    collection = Collection.load(folder, "test")
    assert collection.documents == {"d1": {"title": "Fox", "text": "red"}, "d2": {"title": "", "text": "grey"}}
    assert collection.queries == {"q1": "which fox"}
    assert collection.qrels == {"q1": {"d1": 2, "d2": 0}}
    assert collection.candidates == {}


def test_reads_candidates(folder):
    (folder / "candidates").mkdir()
    (folder / "candidates" / "test.tsv").write_text("query-id\tcorpus-id\nq1\td2\nq1\td1\n")
    assert Collection.load(folder, "test").candidates == {"q1": ["d2", "d1"]}


def test_gzipped_candidates_are_read(folder):
    (folder / "candidates").mkdir()
    (folder / "candidates" / "test.tsv.gz").write_bytes(gzip.compress(b"query-id\tcorpus-id\nq1\td2\n", mtime=0))
    assert Collection.load(folder, "test").candidates == {"q1": ["d2"]}


def test_a_byte_order_mark_is_not_part_of_a_file(folder):
    for path in [folder / "corpus.jsonl", folder / "qrels" / "test.tsv"]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    collection = Collection.load(folder, "test")
    assert list(collection.documents) == ["d1", "d2"]
    assert collection.qrels == {"q1": {"d1": 2, "d2": 0}}


def test_a_gzip_file_that_is_cut_off_is_named(folder):
    path = folder / "queries.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"queries\.jsonl\.gz is cut off after line \d"):
        Collection.load(folder, "test")


def test_ids_may_be_numbers(folder):
    (folder / "corpus.jsonl").write_text('{"_id": 1, "text": "red"}\n{"_id": 2, "text": "grey"}\n')
    (folder / "queries.jsonl").write_text('{"_id": 7, "text": "which fox"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n7\t1\t2\n")
    collection = Collection.load(folder, "test")
    assert list(collection.documents) == ["1", "2"]
    assert collection.queries == {"7": "which fox"}


def test_a_missing_file_is_named(folder):
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl is missing"):
        Collection.load(folder, "test")


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2"), ('{"_id": "d2"}', "line 2: no 'text'"), ("[]", "line 2")]
)
def test_a_broken_line_is_named(folder, line, message):
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "text": "red"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        Collection.load(folder, "test")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("q1 d1 1\n", "line 2"),
        # As TREC has them: the 0 is no document, and the id of a document no grade.
        ("q1\t0\t7\t1\n", "line 2: a row is query id, document id and a whole number"),
        ("q1\td1\t1\nq1\td1\t1\nq1\td1\t0\n", "line 4: query q1 had another grade for document d1"),
    ],
)
def test_a_judgement_of_another_form_or_meaning_is_named(folder, lines, message):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    with pytest.raises(ValueError, match=rf"test\.tsv, {message}"):
        Collection.load(folder, "test")


def test_an_id_of_two_texts_is_named(folder):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d2", "text": "grey"}\n{"_id": "d2", "text": "blue"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 4: the id d2 had another text before"):
        Collection.load(folder, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"_id": "d9", "text": null}', "corpus.jsonl, line 1: the text is None"),
        (b'{"_id": "d9", "text": "x", "title": 7}', "corpus.jsonl, line 1: the title is 7"),
        ('{"_id": "d9", "text": "Käse"}'.encode("latin-1"), "corpus.jsonl, line 1: .*save it as UTF-8"),
    ],
    ids=["null", "number", "latin-1"],
)
def test_a_text_that_is_not_a_string_is_named(folder, line, message):
    for path in folder.glob("corpus.jsonl*"):
        path.unlink()
    (folder / "corpus.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=message):
        Collection.load(folder, "test")


def test_a_source_is_a_folder_and_a_split(folder):
    assert Source.parse("data/scifact:dev") == Source(Path("data/scifact"), "dev")
    assert Source.parse("data/scifact") == Source(Path("data/scifact"), "test")
    assert Source.parse("data/scifact", "dev").split == "dev"
    assert Source.parse("~/data").folder == Path.home() / "data"
    source = Source.parse(f"{folder}:test")
    assert str(source) == f"{folder}:test"
    assert source.name == folder.name
    assert source.load() == Collection.load(folder, "test")
    assert [path.name for path in source.files()] == ["corpus.jsonl", "test.tsv", "queries.jsonl.gz"]


def test_a_source_is_checked_without_reading_it(folder):
    (folder / "corpus.jsonl").write_text("not JSON")
    Source(folder, "test").check()
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv is missing"):
        Source(folder, "dev").check()
    (folder / "queries.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"queries\.jsonl is missing"):
        Source(folder, "test").check()


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", b"red fox\r\n\n[1]\n", ["red fox", "[1]"]),
        ("a.txt", b"\xef\xbb\xbfred\x0bfox\n", ["red\x0bfox"]),
        ("a.txt", b' {"text": "red", "_id": 7}\n', [{"text": "red", "_id": 7}]),
        ("a.jsonl", b'"red"\n{"title": "Fox", "text": ""}', ["red", {"title": "Fox", "text": ""}]),
        ("a.ndjson.gz", gzip.compress(b'"red"\n', mtime=0), ["red"]),
        ("a.txt.gz", gzip.compress(b"red\n", mtime=0), ["red"]),
    ],
)
def test_documents_of_a_file(tmp_path, name, content, documents):
    (tmp_path / name).write_bytes(content)
    assert read_documents(str(tmp_path / name)) == documents


def test_the_format_of_documents_can_be_given(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": "red"}\n')
    assert read_documents(str(tmp_path / "a.txt"), is_jsonl=False) == ['{"text": "red"}']
    (tmp_path / "b.txt").write_text('"red"\n')
    assert read_documents(str(tmp_path / "b.txt"), is_jsonl=True) == ["red"]


def test_documents_of_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ein Füchslein\n\nx".encode())))
    assert read_documents("-") == ["ein Füchslein", "x"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": \n')))
    with pytest.raises(ValueError, match="standard input, line 1: "):
        read_documents("-")
