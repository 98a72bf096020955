"""Readers of rows, and the file of rejected ones."""

import gzip
import json

import pytest

from modeling_querit.files import write_jsonl
from modeling_querit.rejects import Rejects
from modeling_querit.training.data import read_rows

ROWS = [
    {"query": "who wrote it", "documents": [{"title": "A", "text": "book"}], "labels": [0.5]},
    {"query": "the book", "documents": [{"title": None, "text": "x"}], "labels": [0.0]},
]


def test_broken_rows_are_rejected_with_line_and_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(ROWS[0]), "{broken", json.dumps({"query": 1}), json.dumps(ROWS[1]), "\udcff"]
    path.write_text("\n".join(lines), errors="surrogateescape")
    with Rejects(tmp_path / "new" / "rejects.jsonl") as rejects:
        assert list(read_rows(path, rejects)) == ROWS
    assert rejects.count == 3
    entries = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert [entry["error"].partition(":")[0] for entry in entries] == [f"{path}, line {n}" for n in (2, 3, 5)]
    assert entries[0]["row"] == "{broken"


def test_without_broken_rows_there_is_no_file_of_rejects(tmp_path):
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    (tmp_path / "rejects.jsonl").write_text("of an earlier run")
    with Rejects(tmp_path / "rejects.jsonl") as rejects:
        assert list(read_rows(tmp_path / "rows.jsonl", rejects)) == ROWS
    assert not rejects.path.exists()


def test_gzipped_rows_are_read(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert list(read_rows(tmp_path / "rows.jsonl.gz")) == ROWS


def test_parquet_rows_are_read_and_checked(tmp_path):
    datasets = pytest.importorskip("datasets")
    bad = {"query": "no label", "documents": [{"title": None, "text": "x"}], "labels": None}
    datasets.Dataset.from_list([*ROWS, bad]).to_parquet(tmp_path / "rows.parquet")
    with Rejects(tmp_path / "rejects.jsonl") as rejects:
        assert list(read_rows(tmp_path / "rows.parquet", rejects)) == ROWS
    assert json.loads(rejects.path.read_text())["error"].startswith(f"{tmp_path / 'rows.parquet'}, row 3: no 'labels'")


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"rows\.parquet: "):
        list(read_rows(tmp_path / "rows.parquet"))


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 1000)[:-20])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is cut off after line 0, or is not a gzip file"):
        list(read_rows(path))


def test_a_parquet_row_that_is_not_utf8_is_rejected(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"good", b"ba\xff"]).buffers())
    documents, labels = pyarrow.array([["a", "b"]] * 2), pyarrow.array([[1, 0]] * 2)
    table = pyarrow.Table.from_arrays([broken, documents, labels], ["query", "documents", "labels"])
    write_table(table, tmp_path / "rows.parquet")
    with Rejects(tmp_path / "rejects.jsonl") as rejects:
        assert [row["query"] for row in read_rows(tmp_path / "rows.parquet", rejects)] == ["good"]
    assert "rows.parquet, row 2: 'utf-8' codec" in (tmp_path / "rejects.jsonl").read_text()


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig")
    assert list(read_rows(path)) == ROWS
