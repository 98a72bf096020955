"""From sources to checked rows, without a model."""

import datetime
import hashlib
import itertools
import json

import pytest
from small_runs import make_settings

from modeling_querit.files import write_jsonl
from modeling_querit.training.data import read_rows
from modeling_querit.training.prepare import prepare

ROWS = [{"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}"], "labels": [1, 0]} for n in range(6)]
ROW = {"query": "a", "documents": ["b", "c"]}


def write_collection(folder, **texts):
    """A folder in the BEIR layout; each query asks for the document of its own id."""
    names = texts or {name: f"the {name} story" for name in ("fox", "hen", "cow", "dog")}
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in names.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": f"the {name} story"}) + "\n" for name in names)
    )
    judgements = "".join(f"{name}\t{name}\t1\n" for name in names)
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    return f"{folder}:dev"


@pytest.fixture
def run(tmp_path):
    """Prepares a run on rows; returns what it would train and validate on."""

    def prepare_run(rows=ROWS, **settings):
        write_jsonl(rows, tmp_path / "rows.jsonl")
        settings = {"train": [str(tmp_path / "rows.jsonl")]} | settings
        return prepare(make_settings(tmp_path / "out", **settings), tmp_path / "out")

    return prepare_run


def rejected(tmp_path, name="rejects.jsonl"):
    return [json.loads(line)["error"] for line in (tmp_path / "out" / name).read_text().splitlines()]


def test_rows_of_files_come_first_and_mined_ones_after_them(run, tmp_path):
    collection = write_collection(tmp_path / "beir")
    rows, validation = run(train=[str(tmp_path / "rows.jsonl"), collection])
    assert rows[:6] == ROWS
    assert sorted(row["source"] for row in rows[6:]) == ["beir/cow", "beir/dog", "beir/fox", "beir/hen"]
    assert validation == {}
    assert list(read_rows(tmp_path / "out" / "train_rows.jsonl")) == rows


def test_what_was_read_is_recorded_by_its_hash(run, tmp_path):
    folder, _, _ = write_collection(tmp_path / "beir").partition(":")
    rows_file = str(tmp_path / "rows.jsonl")
    run(train=[rows_file, f"{folder}:dev"])
    hashes = json.loads((tmp_path / "out" / "train.json").read_text())["sha256"]
    collection_files = {f"{folder}/{name}" for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv")}
    assert set(hashes) == {"train_rows.jsonl", rows_file} | collection_files
    written = (tmp_path / "out" / "train_rows.jsonl").read_bytes()
    assert hashes["train_rows.jsonl"] == hashlib.sha256(written).hexdigest()


def test_validation_sources_are_named_after_their_folder_or_file(run, tmp_path):
    collection = write_collection(tmp_path / "beir")
    write_jsonl(ROWS[:2], tmp_path / "own.dev.jsonl")
    sources = [collection, str(tmp_path / "own.dev.jsonl")]
    _, validation = run(validation=sources, eval_strategy="steps", eval_steps=1)
    assert {name: len(rows) for name, rows in validation.items()} == {"beir": 4, "own": 2}
    with pytest.raises(ValueError, match="Two validation sources are called 'beir'"):
        run(validation=[collection, collection], eval_strategy="steps", eval_steps=1)


def test_broken_rows_are_written_to_a_file_of_their_own(run, tmp_path, caplog):
    rows, _ = run([*ROWS, {"query": "no documents"}])
    assert rows == ROWS
    assert "1 invalid rows were written to" in caplog.text
    assert rejected(tmp_path)[0].startswith(f"{tmp_path / 'rows.jsonl'}, line 7: no 'documents'")


def test_mined_rows_are_checked_too(run, tmp_path):
    """A lone surrogate in a document could not be written to train_rows.jsonl."""
    texts = {name: f"the {name} story" for name in ("fox", "hen", "cow")} | {"elk": "half a pair \ud800"}
    rows, _ = run(train=[write_collection(tmp_path / "beir", **texts)], top=1, random=0)
    errors = rejected(tmp_path)
    assert len(rows) + len(errors) == 4
    assert any(error.startswith("beir/elk: a document: a lone surrogate") for error in errors)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"scores": {"t": [1, 0]}}, "Training row 2 has no 'labels', but the first row does"),
        ({"labels": None, "scores": {"t": [1, 0]}}, "Training row 2 has no 'labels'"),
    ],
)
def test_rows_without_the_labels_of_the_first_row_are_rejected(run, tmp_path, second, message):
    rows, _ = run([ROW | {"labels": [1, 0]}, ROW | second, ROW | {"labels": [0, 1]}])
    assert len(rows) == 2
    assert message in rejected(tmp_path)[0]


def test_rows_that_no_teacher_scored_are_rejected(run, tmp_path):
    rows, _ = run([ROW | {"scores": {"t": [1, 0]}}, ROW | {"labels": [1, 0], "scores": {"t": None}}])
    assert len(rows) == 1
    assert "Training row 2 has no 'scores'" in rejected(tmp_path)[0]


def test_validation_uses_labels_where_a_row_has_them(run, tmp_path):
    """Though the run learns from scores, which these rows have too."""
    write_jsonl([ROW | {"labels": [0, 1], "scores": {"t": [1, 0]}}], tmp_path / "dev.jsonl")
    validation_settings = {"validation": [str(tmp_path / "dev.jsonl")], "eval_strategy": "steps", "eval_steps": 1}
    _, validation = run([ROW | {"scores": {"t": [1, 0]}}], **validation_settings)
    assert validation == {"dev": [ROW | {"labels": [0, 1]}]}


def test_documents_of_rows_are_sampled_by_bands(run):
    row = {"query": "a", "documents": [f"d{n}" for n in range(20)], "labels": [0] * 10 + [1] + [0] * 9}
    (sample,), _ = run([row], sample_rows=True, top=2, top_depth=4, middle=1, depth=8)
    indices = [int(document[1:]) for document in sample["documents"]]
    assert len(indices) == 5
    assert 10 in indices
    assert sample["labels"] == [int(index == 10) for index in indices]
    assert len([index for index in indices if index < 4]) == 2
    assert len([index for index in indices if 4 <= index < 8]) == 1


def test_tables_may_have_columns_that_json_cannot_represent(run, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = [row | {"when": datetime.datetime(2026, 1, 1), "raw": b"x"} for row in ROWS]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run(train=[str(tmp_path / "rows.parquet")])
    assert len(list(read_rows(tmp_path / "out" / "train_rows.jsonl"))) == len(ROWS)


# -- Checks of rows against the settings


def test_labels_have_to_be_in_the_range_of_the_loss(run, tmp_path):
    with pytest.raises(ValueError, match=r"pointwise_bce needs labels in \[0, 1\], but they go from 0 to 2"):
        run([ROW | {"labels": [2, 0]}], losses=["pointwise_bce"])
    assert not (tmp_path / "out").exists()


def test_a_run_needs_rows(run, tmp_path):
    with pytest.raises(ValueError, match=r"no rows in .*rows\.jsonl"):
        run([])
    assert not (tmp_path / "out").exists()


def test_calibration_is_for_rows_of_scores(run, tmp_path):
    with pytest.raises(ValueError, match="are for rows of scores, but the first row has labels"):
        run(teacher_weights={"bm25": 1})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss", ["pairwise_hinge", "pointwise_bce"])
@pytest.mark.parametrize(
    "alike", [{"labels": [1, 1]}, {"scores": {"t": [0.5, 0.5], "u": [2, None]}}], ids=["labels", "scores"]
)
def test_a_run_needs_documents_that_are_labelled_differently(run, caplog, alike, loss):
    with pytest.raises(ValueError, match=f"No query has two different labels, so {loss} would learn nothing"):
        run([ROW | alike], losses=[loss])
    different = {key: [1, 0] if key == "labels" else {"t": [1, 0], "u": None} for key in alike}
    run([ROW | alike, ROW | different], losses=[loss])
    assert "1 of 2 queries have no two different labels" in caplog.text


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("foo_ndcg_at_10", "validation sources are dev"),
        ("ndcg_at_10", "no validation row has a label above 0"),
        ("dev_mrr_at_10", "no validation row has a label above 0"),
    ],
)
def test_the_metric_that_decides_has_to_be_measured(run, tmp_path, metric, message):
    write_jsonl([ROW | {"labels": [0, 0]}], tmp_path / "dev.jsonl")
    validation_settings = {"validation": [str(tmp_path / "dev.jsonl")], "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=message):
        run(metric_for_best_model=metric, **validation_settings)


# -- Streams


@pytest.fixture
def stream(run):
    pytest.importorskip("datasets")
    return lambda rows, **settings: run(rows, streaming=True, **settings)[0]


def test_a_stream_repeats_its_rows_without_an_end(stream, tmp_path):
    queries = [row["query"] for row in itertools.islice(stream(ROWS), 60)]
    assert set(queries) == {row["query"] for row in ROWS}
    assert not (tmp_path / "out" / "train_rows.jsonl").exists()


@pytest.mark.parametrize("rows", [[], ["not a row"]], ids=["empty", "broken"])
def test_a_stream_without_rows_ends(stream, rows):
    with pytest.raises(ValueError, match="There are no rows in"):
        next(iter(stream(rows)))


def test_a_stream_rejects_rows_while_it_is_read(stream, tmp_path):
    rows = stream([*ROWS, ROW | {"scores": {"t": [1, 0]}}])
    assert all("labels" in row for row in itertools.islice(rows, 20))
    assert "Training row 7 has no 'labels'" in rejected(tmp_path, "rejects_of_stream.jsonl")[0]
