"""Runs of `querit adapt`: what is done, and what is done again after a change."""

import json
import shutil

import pytest
import tiny
import yaml
from filelock import FileLock
from safetensors.torch import save_file
from small_adaptations import (
    data_of,
    lines_of,
    make_documents,
    make_settings,
    make_values,
    manifest_of,
    write_collection,
)

from modeling_querit import QueritForSequenceRanking
from modeling_querit.adaptation.pipeline import STAGE_NAMES, Adaptation
from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.adaptation.teachers import CrossEncoderTeacher
from modeling_querit.checkpoints.identity import identity_of
from modeling_querit.cli import main as run_cli
from modeling_querit.files import write_jsonl

DATA_STAGES, ALL_BUT_REPORT = STAGE_NAMES[:4], STAGE_NAMES[:5]


@pytest.fixture(scope="module")
def model(saved_folders):
    """Folder of a tiny reranker."""
    return saved_folders("qwen3")


@pytest.fixture
def settings(tmp_path, model):
    write_collection(tmp_path / "collection")
    return make_settings(tmp_path, model)


def run_again(settings, stages=DATA_STAGES):
    """Run stages, and return whether each was already done."""
    lines = []
    Adaptation(settings, lines.append).run(stages)
    return ["already done" in line for line in lines]


def change_bias(folder, change):
    tensors = tiny.read_tensors(folder)
    tensors["score.bias"] = tensors["score.bias"] + tensors["score.bias"].new_tensor(change)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_documents_become_a_model_and_a_report(tmp_path, model):
    write_collection(tmp_path / "collection")
    config = tmp_path / "config.yaml"
    values = make_values(tmp_path, model, evaluation=[f"{tmp_path}/collection:test"], evaluation_depth=5)
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as ended:
        run_cli(["adapt", str(config)])
    assert not ended.value.code
    run = tmp_path / "run"
    rows = lines_of(run / "data" / "train.jsonl")
    assert all(set(row["scores"]) == {"bm25", "student"} for row in rows)
    assert all(2 <= len(row["documents"]) <= 5 for row in rows)
    assert all(0 <= row["positive"] < len(row["documents"]) for row in rows)
    before, after = (QueritForSequenceRanking.from_pretrained(folder) for folder in (model, run / "train" / "model"))
    assert not after.predict([("fox", "a fox")]).equal(before.predict([("fox", "a fox")]))
    page = (run / "report" / "report.md").read_text()
    for name in ("queries.png", "drops.png", "scores.png", "training.png"):
        assert f"({name})" in page
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    (metrics,) = json.loads((run / "report" / "figures.json").read_text())["rows"]
    # Queries are titles: BM25 ranks each document first.
    assert metrics["first_stage"] == pytest.approx(100)
    assert 0 <= metrics["adapted"] <= 100
    assert 0 < metrics["p_value"] <= 1
    assert set(manifest_of(run)["stages"]) == set(STAGE_NAMES)
    assert manifest_of(run)["versions"]["transformers"]


# -- What is done again


@pytest.mark.slow
def test_finished_stages_are_not_run_again(settings):
    Adaptation(settings).run(DATA_STAGES)
    files = [path for folder in ("data", "cache") for path in (settings.output_dir / folder).rglob("*.*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run_again(settings) == [True] * 4
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_changed_file_is_written_again(settings):
    Adaptation(settings).run(DATA_STAGES)
    before = data_of(settings.output_dir)
    (settings.output_dir / "data" / "candidates.jsonl").write_text("")
    assert run_again(settings) == [True, True, False, True]
    assert data_of(settings.output_dir) == before


@pytest.mark.slow
def test_changed_settings_change_the_data(settings, tmp_path, model):
    Adaptation(settings).run(DATA_STAGES)
    before = data_of(settings.output_dir)
    # The round trip goes through the first stages, so queries depend on this section too.
    assert run_again(make_settings(tmp_path, model, candidates={"top": 2})) == [True, False, False, False]
    assert data_of(settings.output_dir)["train.jsonl"] != before["train.jsonl"]


@pytest.mark.slow
def test_only_pairs_of_a_changed_document_are_scored_again(settings, tmp_path, monkeypatch):
    Adaptation(settings).run(DATA_STAGES)
    rows = {row["source"]: row for row in lines_of(settings.output_dir / "data" / "train.jsonl")}
    documents = make_documents()
    documents[0]["text"] += " It was seen again."
    write_jsonl(documents, tmp_path / "collection" / "corpus.jsonl")
    scored = []
    score = CrossEncoderTeacher.score
    monkeypatch.setattr(CrossEncoderTeacher, "score", lambda self, pairs: scored.extend(pairs) or score(self, pairs))
    Adaptation(settings).run(DATA_STAGES)
    rows_now = {row["source"]: row for row in lines_of(settings.output_dir / "data" / "train.jsonl")}
    scored_before = {(row["query"], document["text"]) for row in rows.values() for document in row["documents"]}
    assert scored
    assert not [query for query, document in scored if (query, document["text"]) in scored_before]
    assert rows_now.keys() & rows.keys()


@pytest.mark.slow
def test_a_second_run_of_the_same_object_reads_files_again(settings, tmp_path):
    adaptation = Adaptation(settings)
    adaptation.run(DATA_STAGES)
    write_jsonl(make_documents(24), tmp_path / "collection" / "corpus.jsonl")
    adaptation.run(DATA_STAGES)
    Adaptation(settings.model_copy(update={"output_dir": tmp_path / "fresh"})).run(DATA_STAGES)
    data, expected = data_of(settings.output_dir), data_of(tmp_path / "fresh")
    # Cached scores were computed in other batches, and may differ by rounding.
    assert data.pop("train.jsonl").count(b"\n") == expected.pop("train.jsonl").count(b"\n")
    assert data == expected


def test_a_changed_dataset_in_a_folder_is_read_again(tmp_path, model, monkeypatch):
    write_jsonl(make_documents(), tmp_path / "dataset" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = make_settings(tmp_path, model, corpus={"source": "dataset:train"})
    for count in (36, 24):
        write_jsonl(make_documents(count), tmp_path / "dataset" / "train.jsonl")
        Adaptation(settings).run(["corpus"])
        assert manifest_of(tmp_path / "run")["stages"]["corpus"]["counts"]["documents"] == count


@pytest.mark.slow
def test_training_with_other_settings_starts_over_and_keeps_the_model_before(settings, tmp_path, model):
    Adaptation(settings).run(ALL_BUT_REPORT)
    weights = settings.output_dir / "train" / "model" / "model.safetensors"
    before = weights.read_bytes()
    for change in ({"train": {"learning_rate": 1e-3}}, {"queries": {"masked": 0.0}}):
        Adaptation(make_settings(tmp_path, model, **change)).run(ALL_BUT_REPORT)
        assert weights.read_bytes() != before
    set_aside = sorted(settings.output_dir.glob("train-*"))
    assert len(set_aside) == 2
    assert (set_aside[0] / "model" / "model.safetensors").read_bytes() == before
    # Settings that do not change the weights leave the training where it is.
    unmasked = {"queries": {"masked": 0.0}}
    Adaptation(make_settings(tmp_path, model, **unmasked, train={"logging_steps": 2})).run(ALL_BUT_REPORT)
    assert len(list(settings.output_dir.glob("train-*"))) == 2
    # A longer training has another learning rate schedule from its first step on.
    Adaptation(make_settings(tmp_path, model, **unmasked, train={"max_steps": 6})).run(ALL_BUT_REPORT)
    assert len(list(settings.output_dir.glob("train-*"))) == 3
    state = json.loads((settings.output_dir / "train" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_teacher_with_other_weights_under_the_same_name_scores_again(tmp_path, model):
    write_collection(tmp_path / "collection")
    shutil.copytree(model, tmp_path / "model")
    settings = make_settings(tmp_path, tmp_path / "model")
    Adaptation(settings).run(DATA_STAGES)
    before = data_of(settings.output_dir)
    change_bias(tmp_path / "model", [0.0, 0.3])
    assert run_again(settings) == [True, True, True, False]
    assert data_of(settings.output_dir)["train.jsonl"] != before["train.jsonl"]


def test_the_identity_of_an_adapter_includes_its_base(tmp_path, model):
    shutil.copytree(model, tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    before = identity_of(str(tmp_path / "adapter"))
    assert identity_of(str(tmp_path / "adapter")) == before
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    assert identity_of(str(tmp_path / "adapter")) != before


@pytest.mark.slow
def test_a_student_with_other_weights_under_the_same_name_is_trained_again(tmp_path, model):
    write_collection(tmp_path / "collection")
    shutil.copytree(model, tmp_path / "model")
    settings = make_settings(tmp_path, model, train={"model": str(tmp_path / "model")})
    Adaptation(settings).run(ALL_BUT_REPORT)
    change_bias(tmp_path / "model", [1.0, 1.0])
    assert run_again(settings, ALL_BUT_REPORT) == [True] * 4 + [False]


@pytest.mark.slow
def test_the_report_is_written_again_for_other_judgements_and_missing_plots(tmp_path, model):
    write_collection(tmp_path / "collection")
    settings = make_settings(tmp_path, model, evaluation=[f"{tmp_path}/collection:test"], evaluation_depth=5)
    Adaptation(settings).run()
    assert run_again(settings, STAGE_NAMES) == [True] * 6
    plot = settings.output_dir / "report" / "scores.png"
    plot.unlink()
    assert run_again(settings, STAGE_NAMES) == [True] * 5 + [False]
    assert plot.exists()
    qrels = tmp_path / "collection" / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().replace("q0\td0", "q0\td1"))
    assert run_again(settings, STAGE_NAMES) == [True] * 5 + [False]
    (metrics,) = json.loads((settings.output_dir / "report" / "figures.json").read_text())["rows"]
    assert metrics["first_stage"] < 100


# -- What cannot be done


def test_one_command_at_a_time_runs_in_a_folder(settings):
    settings.output_dir.mkdir()
    with FileLock(settings.output_dir / ".lock"), pytest.raises(ValueError, match=r"Another querit adapt is running"):
        Adaptation(settings).run(DATA_STAGES)
    Adaptation(settings).run(["corpus"])


def test_a_stage_needs_its_inputs(settings):
    with pytest.raises(ValueError, match=r"Stage candidates reads .*corpus.jsonl, which does not exist"):
        Adaptation(settings).run(["candidates"])


def test_an_unknown_stage_is_refused(settings):
    with pytest.raises(ValueError, match="stage is 'scores': choose from corpus, queries"):
        Adaptation(settings).run(["scores"])


def test_a_server_that_is_down_is_named_at_the_start(tmp_path, model, capsys):
    write_collection(tmp_path / "collection")
    server = {"type": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}
    values = make_values(tmp_path, model, teachers={"bm25": {}, "server": server})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as ended:
        run_cli(["adapt", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("querit: http://127.0.0.1:9/v1/rerank could not be reached")
    assert line.endswith("start the server, or correct url.")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_server_of_a_finished_stage_may_be_down(tmp_path, model, httpserver):
    write_collection(tmp_path / "collection")
    httpserver.expect_request("/v1/chat/completions").respond_with_json(
        {
            "choices": [
                {"message": {"content": "where does the animal sleep through the winter"}, "finish_reason": "stop"}
            ]
        }
    )
    server = {"type": "endpoint", "url": httpserver.url_for("/v1"), "model": "m", "backoff": 0.01}
    settings = make_settings(tmp_path, model, queries={"generators": {"server": server}})
    Adaptation(settings).run(["corpus", "queries"])
    httpserver.stop()
    Adaptation(settings).run(["corpus", "queries", "candidates"])


def test_home_folders_are_expanded(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_collection(tmp_path / "collection")
    values = make_values(tmp_path, model)
    values |= {"output_dir": "~/run", "corpus": {"source": ["~/collection"], "sample": 12}}
    Adaptation(AdaptSettings.model_validate(values)).run(DATA_STAGES)
    assert (tmp_path / "run" / "data" / "train.jsonl").exists()
