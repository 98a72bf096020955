import gzip
import json

import pytest

from modeling_querit.retrieval.collection import Collection


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
    assert Collection.splits(folder) == ["test"]


def test_reads_candidates(folder):
    (folder / "candidates").mkdir()
    (folder / "candidates" / "test.tsv").write_text("query-id\tcorpus-id\nq1\td2\nq1\td1\n")
    assert Collection.load(folder, "test").candidates == {"q1": ["d2", "d1"]}


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


def test_a_judgement_without_columns_is_named(folder):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1 d1 1\n")
    with pytest.raises(ValueError, match=r"test\.tsv, line 2"):
        Collection.load(folder, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"_id": "d9", "text": null}', "corpus.jsonl, line 1: the text is None"),
        (b'{"_id": "d9", "text": "x", "title": 7}', "corpus.jsonl, line 1: the title is 7"),
        ('{"_id": "d9", "text": "Käse"}'.encode("latin-1"), "corpus.jsonl, after line 0: .*save it as UTF-8"),
    ],
    ids=["null", "number", "latin-1"],
)
def test_a_text_that_is_none_is_named(folder, line, message):
    for path in folder.glob("corpus.jsonl*"):
        path.unlink()
    (folder / "corpus.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=message):
        Collection.load(folder, "test")
