import json

import pytest

from modeling_querit.evaluation.sources import find_collection


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "animals/qrels").mkdir(parents=True)
    (tmp_path / "animals/corpus.jsonl").write_text(json.dumps({"_id": "a", "title": "Fox", "text": "red"}) + "\n")
    (tmp_path / "animals/queries.jsonl").write_text(json.dumps({"_id": "q", "text": "fox"}) + "\n")
    (tmp_path / "animals/qrels/dev.tsv").write_text("q\ta\t1\n")
    return tmp_path / "animals"


def test_a_beir_folder(folder):
    source = find_collection(f"{folder}:dev")
    source.check()
    assert source.name == "animals:dev"
    assert source.load().queries == {"q": "fox"}
    before = source.identity()
    assert set(before) == {"corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"}
    (folder / "qrels/dev.tsv").write_text("q\ta\t2\n")
    assert source.identity() != before
    with pytest.raises(FileNotFoundError, match=r"qrels/test\.tsv is missing"):
        find_collection(str(folder)).check()


def test_an_ir_dataset(tmp_path):
    ir_datasets = pytest.importorskip("ir_datasets")
    (tmp_path / "docs.tsv").write_text("a\tred fox\nb\tblue sea\n")
    (tmp_path / "queries.tsv").write_text("q\tfox\nunjudged\tsea\n")
    (tmp_path / "qrels").write_text("q 0 a 1\nq 0 gone 1\nr 0 a 1\n")
    (tmp_path / "run").write_text("q Q0 b 1 0.5 x\nq Q0 a 2 0.4 x\nq Q0 gone 3 0.4 x\n")
    files = {"docs_tsv": "docs.tsv", "queries_tsv": "queries.tsv", "qrels_trec": "qrels"}
    parts = {name: str(tmp_path / file) for name, file in files.items()}
    for name, options in {"tiny/test": parts, "tiny": {"docs_tsv": parts["docs_tsv"]}}.items():
        if name not in ir_datasets.registry:
            ir_datasets.registry.register(name, ir_datasets.create_dataset(**options))
    source = find_collection("ir_datasets:tiny/test")
    source.check()
    collection = source.load()
    assert (source.name, source.identity()) == ("tiny/test", "tiny/test")
    assert collection.documents["a"] == {"title": "", "text": "red fox"}
    assert collection.queries == {"q": "fox"}
    assert collection.qrels == {"q": {"a": 1, "gone": 1}}
    with pytest.raises(ValueError, match="tiny has no queries: name a subset"):
        find_collection("ir_datasets:tiny").check()
    with pytest.raises(ValueError, match="no dataset 'nowhere'"):
        find_collection("ir_datasets:nowhere").check()
