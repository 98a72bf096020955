import gzip
import json
from typing import NamedTuple

import pytest

from modeling_querit.retrieval.texts import open_texts

DOCUMENTS = {"d1": "Red fox It runs.", "d2": "it swims", "d3": ""}
JSONL = [
    {"_id": "d1", "title": "Red fox", "text": "It runs."},
    {"_id": "d2", "title": "", "text": "it swims", "metadata": {}},
    {"_id": "d3", "text": ""},
]
CORPORA = {
    "corpus.jsonl": "".join(json.dumps(row) + "\n" for row in JSONL),
    "corpus.tsv": "id\ttitle\ttext\nd1\tRed fox\tIt runs.\nd2\tit swims\nd3\t\n",
}
QUERIES = {"queries.jsonl": '{"_id": 1, "text": " fox "}\n', "queries.tsv": "1\t fox \n"}


def write(folder, name, text, is_gzipped):
    if is_gzipped:
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize("is_gzipped", [False, True])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("queries", QUERIES)
def test_every_layout_gives_the_same_texts(tmp_path, corpus, queries, is_gzipped):
    write(tmp_path, corpus, CORPORA[corpus], is_gzipped)
    write(tmp_path, queries, QUERIES[queries], is_gzipped)
    found_queries, documents = open_texts(tmp_path)
    assert {text.id: text.text for text in documents.read(None)} == DOCUMENTS
    # A query is what the user typed.
    assert [(text.id, text.text) for text in found_queries.read(None)] == [("1", " fox ")]
    assert documents.files == (tmp_path / f"{corpus}{'.gz' * is_gzipped}",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus.jsonl", b'{"_id": "a", "text": "b"}\n{"_id": "c"}\n', r"corpus\.jsonl, line 2: no 'text'"),
        ("corpus.jsonl", b'{"_id": "a", "text": 1}\n', r"corpus\.jsonl, line 1: the text is 1"),
        ("corpus.tsv", b"a\tb\nc\n", r"corpus\.tsv, line 2: expected id and text, .* found 1 columns"),
        ("corpus.tsv", b"a\tb\tc\td\n", r"corpus\.tsv, line 1: .* found 4 columns"),
        ("corpus.tsv", b"a\t\xff\n", r"corpus\.tsv, line 1: .*UTF-8"),
    ],
)
def test_a_broken_line_is_named_or_set_aside(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    (tmp_path / "queries.tsv").write_text("1\tfox\n")
    _, documents = open_texts(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(documents.read(None))
    errors = []
    assert len(list(documents.read(lambda error, row: errors.append(error)))) == text.count(b"\n") - 1
    assert len(errors) == 1


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no queries\.jsonl or queries\.tsv"):
        open_texts(tmp_path)
    (tmp_path / "queries.tsv").write_text("1\tfox\n")
    with pytest.raises(FileNotFoundError, match=r"has no corpus\.jsonl"):
        open_texts(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_texts(tmp_path / "queries.tsv")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        open_texts("no/such-dataset")


class Topic(NamedTuple):
    query_id: str
    title: str
    narrative: str

    def default_text(self):
        return self.title


class Article(NamedTuple):
    doc_id: str
    url: str
    title: str
    text: str

    def default_text(self):
        return f"{self.title} {self.text}"


class Record(NamedTuple):
    doc_id: str
    headline: str
    body: str

    def default_text(self):
        return f"{self.headline}\n{self.body}"


@pytest.mark.parametrize(
    ("document", "text"),
    [(Article("a", "http://x", "", "It runs."), "It runs."), (Record("a", "Fox", "runs"), "Fox\nruns")],
)
def test_ids_of_ir_datasets_are_read(document, text):
    ir_datasets = pytest.importorskip("ir_datasets")
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import BaseDocs, BaseQueries

    class Documents(BaseDocs):
        def docs_iter(self):
            return iter([document])

    class Queries(BaseQueries):
        def queries_iter(self):
            return iter([Topic("7", "fox", "long")])

    name = f"querit-test-{type(document).__name__}"
    ir_datasets.registry.register(name, Dataset(Documents(), Queries()))
    ir_datasets.registry.register(f"{name}-corpus", Dataset(Documents()))
    queries, documents = open_texts(f"ir_datasets:{name}")
    assert [(found.id, found.text) for found in queries.read(None)] == [("7", "fox")]
    assert [(found.id, found.text) for found in documents.read(None)] == [("a", text)]
    with pytest.raises(FileNotFoundError, match="has no queries"):
        open_texts(f"ir_datasets:{name}-corpus")
