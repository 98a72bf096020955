"""`querit train` from start to end, on tiny models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import as_flags, make_settings

from modeling_querit import QueritForSequenceRanking
from modeling_querit.cards import read_inherited
from modeling_querit.files import write_jsonl
from modeling_querit.training.train import main, train

pytest.importorskip("peft")

ROWS = [{"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}"], "labels": [1, 0]} for n in range(6)]
PAIRS = [("number 1", "this is 1"), ("number 1", "x")]


@pytest.fixture
def rows(tmp_path):
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def run(saved_folder, rows, tmp_path):
    """Trains the tiny model on the rows; returns its trainer."""

    def train_run(name="out", **settings):
        settings = {"model": str(saved_folder), "train": [rows]} | settings
        return train(make_settings(tmp_path / name, **settings))

    return train_run


def load(folder):
    return QueritForSequenceRanking.from_pretrained(folder)


@pytest.mark.slow
def test_the_command_trains_all_weights_and_writes_its_record(saved_folder, rows, tmp_path):
    main(as_flags(tmp_path / "out", model=saved_folder, train=rows))
    assert not load(tmp_path / "out" / "model").predict(PAIRS).equal(load(saved_folder).predict(PAIRS))
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["settings"]["model"] == str(saved_folder)
    assert record["settings"]["max_steps"] == 2
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_terms_of_the_base_are_passed_on(saved_folder, rows, tmp_path, capsys):
    shutil.copytree(saved_folder, tmp_path / "base")
    card = "---\nlicense: gemma\nlanguage: de\nbase_model: google/gemma-3-270m\n---\nA model.\n"
    (tmp_path / "base" / "README.md").write_text(card)
    (tmp_path / "base" / "NOTICE").write_text("Gemma is provided under its terms.\n")
    main(as_flags(tmp_path / "out", model=tmp_path / "base", train=rows))
    assert capsys.readouterr().out.endswith(f"Wrote {tmp_path / 'out' / 'model'}\n")
    written = read_inherited(tmp_path / "out" / "model")
    assert written.data == {
        "license": "gemma",
        "language": "de",
        "base_model": "google/gemma-3-270m",
        "base_model_relation": "finetune",
    }
    assert written.files == {"NOTICE": "Gemma is provided under its terms.\n"}


@pytest.mark.slow
def test_adapters_are_saved_and_merged(saved_folder, rows, tmp_path):
    from peft import PeftModel

    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {saved_folder}\ntrain: [{rows}]\nlora_rank: 2\nfirst_layer: 1\nlosses: [listwise_kl]\n"
        f"learning_rate: 1.0e-2\n"
    )
    main([str(config), *as_flags(tmp_path / "out")])
    merged, base = load(tmp_path / "out" / "model"), load(saved_folder)
    before = base.predict(PAIRS)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert adapted.predict(PAIRS).tolist() == pytest.approx(merged.predict(PAIRS).tolist(), abs=1e-5)
    assert (merged.predict(PAIRS) - before).abs().max() > 1e-3
    assert_trained_from_layer_1_on(merged, saved_folder)


@pytest.mark.slow
def test_layers_below_the_first_are_frozen(run, saved_folder, tmp_path):
    run(first_layer=1, learning_rate=1e-2)
    assert_trained_from_layer_1_on(load(tmp_path / "out" / "model"), saved_folder)


def assert_trained_from_layer_1_on(model, folder):
    before = dict(load(folder).named_parameters())
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or "embed" in name:
            assert parameter.equal(before[name]), name
        elif "q_proj" in name:
            assert not parameter.equal(before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_there_is_no_layer_after_the_last(run, rank):
    with pytest.raises(ValueError, match="has layers 0 to 1"):
        run(lora_rank=rank, first_layer=2)


@pytest.mark.slow
def test_adapters_reach_all_linear_layers_of_the_attention(run, saved_folder, tmp_path):
    run(lora_rank=2)
    adapted = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")}
    modules = load(saved_folder).model.named_modules()
    linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert linear <= adapted


@pytest.mark.slow
def test_early_stopping_counts_validations_of_all_sources_once(run, rows, tmp_path):
    write_jsonl(ROWS[:3], tmp_path / "dev.jsonl")
    trainer = run(
        validation=[rows, str(tmp_path / "dev.jsonl")],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="ndcg_at_10",
        load_best_model_at_end=True,
        early_stopping_patience=1,
        # Nothing gets better.
        learning_rate=0,
        max_steps=9,
    )
    assert trainer.state.global_step == 2
    names = {name for log in trainer.state.log_history for name in log}
    assert {"eval_dev_ndcg_at_10", "eval_rows_mrr_at_10", "eval_dev_loss", "eval_ndcg_at_10"} <= names


@pytest.mark.slow
def test_rows_of_scores_are_distilled(run, tmp_path):
    scored = [
        {"query": row["query"], "documents": row["documents"], "scores": {"a": [9, 1], "b": [0.1, 0.9]}} for row in ROWS
    ]
    write_jsonl(scored, tmp_path / "scored.jsonl")
    trainer = run(train=[str(tmp_path / "scored.jsonl")], teacher_weights={"a": 3, "b": 1})
    teachers = json.loads((tmp_path / "out" / "teachers.json").read_text())
    assert {name: entry["weight"] for name, entry in teachers.items()} == {"a": 3, "b": 1}
    assert trainer.data_collator(scored[:1])["labels"].tolist() == pytest.approx([0.75, 0.25])
    with pytest.raises(ValueError, match="No row has scores of teacher 'c'"):
        run("other", train=[str(tmp_path / "scored.jsonl")], teacher_weights={"c": 1})


@pytest.mark.slow
def test_rows_are_streamed(run, rows, tmp_path):
    pytest.importorskip("datasets")
    run(streaming=True)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "train.json").read_text())["sha256"].keys() == {rows}


@pytest.mark.slow
def test_a_collapsed_run_writes_no_model(run, tmp_path):
    with pytest.raises(ValueError, match=r"Stopped at step .* not finite.* No model was written"):
        run(max_steps=30, learning_rate=1e38)
    assert not (tmp_path / "out" / "model").exists()
