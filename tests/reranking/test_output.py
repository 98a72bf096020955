import gzip
import json

import pytest

from modeling_querit.reranking.output import fuse_by, keep_probable, write_output
from modeling_querit.reranking.shards import Shards, ShardWriter, shard_path
from modeling_querit.reranking.tasks import Tasks, stage_rows, stage_run
from modeling_querit.retrieval.texts import open_texts

ROWS = [
    {"query": "a", "documents": ["x", "y", "z"], "scores": [3, 2, 1], "note": "ü \ud800"},
    {"query": "b", "documents": ["x"], "scores": [0.5]},
]
ROW_SCORES = [0.25, -0.5, 0.75, 0.125]


@pytest.fixture
def write(tmp_path):
    def write(stage, scores, *args, **kwargs):
        stage(tmp_path / "tasks")
        tasks = Tasks(tmp_path / "tasks")
        writer = ShardWriter(shard_path(tmp_path, 0))
        writer.add(0, scores)
        writer.close()
        shards = Shards(tmp_path, tasks.num_blocks)
        write_output(tmp_path / "out", tasks, shards, *args, **kwargs)
        shards.close()
        tasks.close()
        return (tmp_path / "out").read_bytes()

    return write


@pytest.fixture
def run(tmp_path):
    (tmp_path / "corpus.tsv").write_text("d1\tx\nd2\ty\nd3\tz\n")
    (tmp_path / "queries.tsv").write_text("q1\ta\nq2\tb\n")
    lines = ["q1 Q0 d1 1 9 x", "q1 Q0 d2 2 8 x", "q1 Q0 d3 3 7 x", "q2 Q0 d1 1 1 x"]
    (tmp_path / "a.trec").write_text("\n".join(lines))
    return lambda path: stage_run(path, tmp_path / "a.trec", *open_texts(tmp_path))


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return lambda path: stage_rows(path, tmp_path / "rows.jsonl", depth=2)


def test_a_run_is_ordered_by_score_and_equal_scores_keep_their_order(write, run):
    assert write(run, [0.5, 0.75, 0.5, -0.1], None, None).decode().splitlines() == [
        "q1 Q0 d2 1 0.75 querit",
        "q1 Q0 d1 2 0.5 querit",
        "q1 Q0 d3 3 0.5 querit",
        "q2 Q0 d1 1 -0.1 querit",
    ]


def test_scores_are_fused_within_each_query(write, run):
    # min-max: the run has 1, 0.5, 0; the model 0, 1, 0.5.
    assert write(run, [0.0, 1.0, 0.5, -0.1], fuse_by(0.25, "min-max"), None).decode().splitlines() == [
        "q1 Q0 d2 1 0.875 querit",
        "q1 Q0 d3 2 0.375 querit",
        "q1 Q0 d1 3 0.25 querit",
        "q2 Q0 d1 1 0.0 querit",
    ]


def test_improbable_documents_are_left_out_by_the_models_score(write, run):
    keep = keep_probable(lambda score: (score + 1) / 2, 0.75)
    # The last query has nothing to say.
    assert write(run, [0.0, 1.0, 0.5, -0.1], fuse_by(1.0, "rrf"), keep).decode().splitlines() == [
        f"q1 Q0 d2 1 {1 / 62} querit",
        f"q1 Q0 d3 2 {1 / 63} querit",
    ]


def test_rows_get_scores_in_the_order_of_their_documents(write, rows):
    written = [json.loads(line) for line in write(rows, [0.25, -0.5, 0.125], None, None).splitlines()]
    # Documents beyond the depth have no score.
    assert written == [ROWS[0] | {"scores": [0.25, -0.5, None]}, ROWS[1] | {"scores": [0.125]}]


def test_improbable_documents_of_rows_have_no_score(write, rows):
    keep = keep_probable(lambda score: (score + 1) / 2, 0.5)
    written = [json.loads(line)["scores"] for line in write(rows, [0.25, -0.5, 0.125], None, keep).splitlines()]
    assert written == [[0.25, None, None], [0.125]]


def test_compressed_output_has_no_time_in_it(write, run):
    first = write(run, [0.5, 0.75, 0.5, -0.1], None, None, is_gzipped=True)
    assert gzip.decompress(first).startswith(b"q1 Q0 d2 1 0.75")
    assert int.from_bytes(first[4:8], "little") == 0
