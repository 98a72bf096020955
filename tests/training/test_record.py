"""The record of a run, and what it takes to resume one."""

import json
import math

import pytest
from small_runs import make_settings

from modeling_querit.files import write_jsonl
from modeling_querit.training.prepare import prepare
from modeling_querit.training.record import newest_checkpoint

ROWS = [{"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}"], "labels": [1, 0]} for n in range(6)]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def begin(tmp_path, out):
    """Begins a run, or resumes it: writes its record, as training does before its first step."""
    write_jsonl(ROWS, tmp_path / "rows.jsonl")

    def begin_run(**settings):
        prepare(make_settings(out, train=[str(tmp_path / "rows.jsonl")], **settings), out)
        return json.loads((out / "train.json").read_text())

    return begin_run


def write_checkpoint(out, step=1):
    (out / f"checkpoint-{step}").mkdir()
    (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")


def test_the_record_has_what_repeats_the_run(begin):
    record = begin(learning_rate=1e-4)
    assert record["settings"]["learning_rate"] == 1e-4
    assert "losses" not in record["settings"]
    assert record["resolved"]["QueritTrainingArguments"]["weight_decay"] == 0.0
    assert record["versions"]["transformers"]
    assert record["processes"] == 1


def test_secrets_are_not_recorded(begin, out):
    begin(hub_token="hf_secret")
    assert "hf_secret" not in (out / "train.json").read_text()


def test_a_run_is_resumed_as_it_began(begin, out):
    begin(learning_rate=0.01)
    write_checkpoint(out)
    begin(learning_rate=0.01, resume=True, max_steps=9, logging_steps=3)
    with pytest.raises(ValueError, match=r"was begun with learning_rate 0\.01, not 0\.5: give the same value"):
        begin(learning_rate=0.5, resume=True)


def test_checkpoints_of_a_run_are_not_overwritten(begin, out):
    begin()
    write_checkpoint(out)
    with pytest.raises(ValueError, match="holds checkpoints of a run: add --resume"):
        begin()


def test_a_model_is_not_overwritten(begin, out):
    begin()
    (out / "model").mkdir()
    with pytest.raises(ValueError, match="model exists: name another output_dir"):
        begin(seed=1)


def test_a_run_is_not_resumed_with_other_files(begin, out, tmp_path):
    begin()
    write_checkpoint(out)
    write_jsonl(ROWS[1:], tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since the run"):
        begin(resume=True)


def test_a_run_is_not_resumed_with_other_rows(begin, out):
    """What is sampled, mined and filtered may differ though no file has changed."""
    record = begin()
    write_checkpoint(out)
    record["sha256"]["train_rows.jsonl"] = "0" * 64
    (out / "train.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"train_rows\.jsonl has changed since the run"):
        begin(resume=True)


def test_a_run_is_not_resumed_by_other_processes(begin, out):
    record = begin()
    write_checkpoint(out)
    (out / "train.json").write_text(json.dumps(record | {"processes": 2}))
    with pytest.raises(ValueError, match="was begun by 2 processes, not 1"):
        begin(resume=True)


def test_mappings_that_were_recorded_as_json_text_are_the_same_settings(out, tmp_path):
    write_jsonl([row | {"labels": None, "scores": {"t": [1, 0]}} for row in ROWS], tmp_path / "rows.jsonl")
    settings = {"train": [str(tmp_path / "rows.jsonl")], "teacher_weights": {"t": 2}}
    prepare(make_settings(out, **settings), out)
    write_checkpoint(out)
    record = json.loads((out / "train.json").read_text())
    record["settings"]["teacher_weights"] = '{"t": 2}'
    (out / "train.json").write_text(json.dumps(record))
    prepare(make_settings(out, resume=True, **settings), out)


def test_an_infinite_setting_is_recorded_in_json_and_resumed(begin, out):
    record = begin(max_grad_norm=math.inf)
    assert record["settings"]["max_grad_norm"] == "Infinity"
    write_checkpoint(out)
    begin(max_grad_norm=math.inf, resume=True)
    with pytest.raises(ValueError, match="begun with max_grad_norm 'Infinity'"):
        begin(max_grad_norm=5, resume=True)


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    for step in (2, 10, 30):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text('{"cut')
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"\x10\x00\x00")
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert newest_checkpoint(tmp_path / "nothing") is None
