import gzip
import json

import pytest

from modeling_querit.rejects import Rejects
from modeling_querit.reranking.tasks import PAIRS_PER_BLOCK, Tasks, stage_rows, stage_run
from modeling_querit.retrieval.texts import open_texts

RUN = ["q1 Q0 d1 1 9.0 bm25", "q1 Q0 d2 2 9.5 bm25", "q2 Q0 d2 1 1e-3 bm25"]
ROWS = [
    {"query": "fox", "documents": ["red fox", {"title": "Sea", "text": "salt"}], "scores": [1, 0.5], "id": 7},
    {"query": "none", "documents": []},
    {"query": "sea \ud800", "documents": ["salt"], "scores": [2]},
]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "collection"
    folder.mkdir()
    rows = [{"_id": "d1", "title": "Red", "text": "fox"}, {"_id": "d2", "text": "sea"}, {"_id": "d3", "text": ""}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.tsv").write_text("q1\twhat runs\nq2\twhat is salty\nq4\t  \n")
    return open_texts(folder)


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def contents(path):
    tasks = Tasks(path)
    pairs = [tasks.pairs(block) for block in range(tasks.num_blocks)]
    ranked = [list(tasks.ranked(block)) for block in range(tasks.num_blocks)]
    tasks.close()
    return pairs, ranked


def test_a_run_is_staged_with_its_texts_best_first(tmp_path, texts):
    stage_run(tmp_path / "tasks", write(tmp_path / "a.trec", RUN), *texts)
    pairs, ranked = contents(tmp_path / "tasks")
    assert pairs == [[("what runs", "sea"), ("what runs", "Red fox"), ("what is salty", "sea")]]
    assert ranked == [[("q1", ["d2", "d1"], [9.5, 9.0], None, 2), ("q2", ["d2"], [0.001], None, 1)]]


def test_depth_keeps_the_best_of_each_query(tmp_path, texts):
    (tmp_path / "a.trec.gz").write_bytes(gzip.compress("\n".join(RUN).encode()))
    stage_run(tmp_path / "tasks", tmp_path / "a.trec.gz", *texts, depth=1)
    assert [[hit.documents for hit in block] for block in contents(tmp_path / "tasks")[1]] == [[["d2"], ["d2"]]]


def test_blocks_end_with_the_query_that_fills_them(tmp_path, texts):
    rows = [{"query": "fox", "documents": ["a"] * size} for size in (1, PAIRS_PER_BLOCK - 2, 1, PAIRS_PER_BLOCK, 3)]
    stage_rows(tmp_path / "tasks", write(tmp_path / "rows.jsonl", map(json.dumps, rows)))
    sizes = [[row.pairs for row in block] for block in contents(tmp_path / "tasks")[1]]
    assert sizes == [[1, PAIRS_PER_BLOCK - 2, 1], [PAIRS_PER_BLOCK], [3]]


BROKEN = {
    "no run": ('{"q": {"d1": 1}}', r"a\.trec, line 4: not 'query Q0 document rank score tag'"),
    "no score": ("q2 Q0 d1 2 nan x", r"line 4: the score is nan"),
    "twice": ("q2 Q0 d2 2 0.5 x", r"line 4: query q2 has document d2 twice"),
    "not together": ("q1 Q0 d3 3 0.5 x", r"line 4: query q1 was there before: sort the run by query"),
    "unknown document": ("q2 Q0 d9 2 0.5 x", r"line 4: document d9 has no text in .*corpus\.jsonl"),
    "unknown query": ("q3 Q0 d1 1 0.5 x", r"line 4: query q3 has no text in .*queries\.tsv"),
    "query without text": ("q4 Q0 d1 1 0.5 x", r"line 4: query q4 has no text in .*queries\.tsv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_or_set_aside(tmp_path, texts, name):
    line, message = BROKEN[name]
    stage_run(tmp_path / "expected", write(tmp_path / "good.trec", RUN), *texts)
    run = write(tmp_path / "a.trec", [*RUN, line])
    with pytest.raises(ValueError, match=message):
        stage_run(tmp_path / "tasks", run, *texts)
    (tmp_path / "tasks").unlink()
    with Rejects(tmp_path / "rejects.jsonl") as rejects:
        stage_run(tmp_path / "tasks", run, *texts, rejects=rejects)
    assert contents(tmp_path / "tasks") == contents(tmp_path / "expected")
    assert rejects.count == 1
    assert "line 4" in json.loads((tmp_path / "rejects.jsonl").read_text())["error"]


def test_an_empty_document_is_a_document(tmp_path, texts):
    stage_run(tmp_path / "tasks", write(tmp_path / "a.trec", ["q1 Q0 d3 1 1 x"]), *texts)
    assert contents(tmp_path / "tasks")[0] == [[("what runs", "")]]


@pytest.mark.parametrize("lines", [[], ["nonsense"]])
def test_a_run_of_nothing_is_refused(tmp_path, texts, lines):
    with pytest.raises(ValueError, match="has nothing to rerank"), Rejects(None) as rejects:
        stage_run(tmp_path / "tasks", write(tmp_path / "a.trec", lines), *texts, rejects=rejects)


def test_an_empty_collection_is_named(tmp_path, texts):
    (tmp_path / "collection" / "corpus.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"corpus\.jsonl is empty"):
        stage_run(tmp_path / "tasks", write(tmp_path / "a.trec", RUN), *texts)


def test_an_id_that_is_there_twice_is_refused(tmp_path, texts):
    with (tmp_path / "collection" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d7", "text": "a"}\n{"_id": "d7", "text": "b"}\n{"_id": "d1", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 6: the id d1 was there before"):
        stage_run(tmp_path / "tasks", write(tmp_path / "a.trec", RUN), *texts)


def test_a_query_with_lone_surrogates_is_that_of_rank(tmp_path, texts):
    (tmp_path / "collection" / "queries.tsv").unlink()
    write(tmp_path / "collection" / "queries.jsonl", ['{"_id": "q1", "text": "sea \\ud800"}'])
    queries, documents = open_texts(tmp_path / "collection")
    stage_run(tmp_path / "tasks", write(tmp_path / "a.trec", ["q1 Q0 d3 1 1 x"]), queries, documents)
    assert contents(tmp_path / "tasks")[0] == [[("sea \ufffd", "")]]


def test_rows_are_staged_as_they_are(tmp_path):
    stage_rows(tmp_path / "tasks", write(tmp_path / "rows.jsonl", map(json.dumps, ROWS)), depth=1)
    pairs, ranked = contents(tmp_path / "tasks")
    assert pairs == [[("fox", "red fox"), ("sea \ud800", "salt")]]
    assert [row.row for row in ranked[0]] == ROWS
    assert [row.scores for row in ranked[0]] == [[1, 0.5], None, [2]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[]", "a row has a 'query'"),
        ('{"query": "a"}', "a row has a 'query'"),
        ('{"query": 1, "documents": []}', "a row has a 'query'"),
        ('{"query": " ", "documents": []}', "the query has no text"),
        ('{"query": "a", "documents": [1]}', "a document is a string"),
        ('{"query": "a", "documents": ["b"]}', "to fuse, a row needs 'scores'"),
        ('{"query": "a", "documents": ["b"], "scores": [NaN]}', "to fuse, a row needs 'scores'"),
        ('{"query": "a", "documents": ["b"], "scores": {"bm25": [1]}}', "to fuse, a row needs 'scores'"),
        ("{", "Expecting property name"),
    ],
)
def test_broken_rows_are_named_or_set_aside(tmp_path, row, message):
    rows = write(tmp_path / "rows.jsonl", [json.dumps(ROWS[0]), row])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {message}"):
        stage_rows(tmp_path / "tasks", rows, needs_scores=True)
    (tmp_path / "tasks").unlink()
    with Rejects(None) as rejects:
        stage_rows(tmp_path / "tasks", rows, needs_scores=True, rejects=rejects)
    assert rejects.count == 1
    assert len(contents(tmp_path / "tasks")[1][0]) == 1
