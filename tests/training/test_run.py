import datetime
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_querit import QueritForSequenceRanking
from modeling_querit.files import write_jsonl
from modeling_querit.training.reading import read_rows
from modeling_querit.training.run import main, train
from modeling_querit.training.settings import parse

pytest.importorskip("peft")

ROWS = [{"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}"], "labels": [1, 0]} for n in range(6)]
QUICK = [
    "--max_steps",
    "2",
    "--report_to",
    "none",
    "--use_cpu",
    "True",
    "--disable_tqdm",
    "True",
    "--logging_steps",
    "1",
    "--save_strategy",
    "no",
]


@pytest.fixture
def rows(tmp_path):
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def collection(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    names = ["fox", "hen", "cow", "dog"]
    lines = [json.dumps({"_id": name, "title": "", "text": f"the {name} story"}) + "\n" for name in names]
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "queries.jsonl").write_text("".join(lines))
    (folder / "qrels" / "dev.tsv").write_text(
        "q\td\ts\n".replace("q\t", "query-id\t") + "".join(f"{n}\t{n}\t1\n" for n in names)
    )
    return f"{folder}:dev"


def test_trains_all_weights_and_writes_what_repeats_it(saved_folder, rows, collection, tmp_path):
    out = tmp_path / "out"
    main(["--model", str(saved_folder), "--train", rows, collection, "--output_dir", str(out), *QUICK])
    before = QueritForSequenceRanking.from_pretrained(saved_folder)
    after = QueritForSequenceRanking.from_pretrained(out / "model")
    pairs = [("number 1", "this is 1"), ("number 1", "x")]
    assert not after.predict(pairs).equal(before.predict(pairs))
    used = list(read_rows(out / "train_rows.jsonl"))
    assert used[:6] == ROWS
    assert sorted(row["source"] for row in used[6:]) == ["beir/cow", "beir/dog", "beir/fox", "beir/hen"]
    record = json.loads((out / "train.json").read_text())
    assert record["settings"]["model"] == str(saved_folder)
    assert record["settings"]["max_steps"] == 2
    assert "losses" not in record["settings"]
    assert record["versions"]["transformers"]
    digest = hashlib.sha256((out / "train_rows.jsonl").read_bytes()).hexdigest()
    assert record["sha256"]["train_rows.jsonl"] == digest
    folder = collection.removesuffix(":dev")
    assert set(record["sha256"]) == {
        "train_rows.jsonl",
        rows,
        *(f"{folder}/{name}" for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv")),
    }
    assert record["resolved"]["QueritTrainingArguments"]["learning_rate"] == 5e-5
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_adapters_are_saved_and_merged(saved_folder, rows, tmp_path):
    from peft import PeftModel

    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {saved_folder}\ntrain: [{rows}]\nlora_rank: 2\nfirst_layer: 1\nlosses: [listwise_kl]\n"
        f"learning_rate: 1.0e-2\noutput_dir: {tmp_path / 'out'}\n"
    )
    main([str(config), *QUICK])
    pairs = [("number 1", "this is 1"), ("number 1", "x")]
    merged = QueritForSequenceRanking.from_pretrained(tmp_path / "out" / "model")
    base = QueritForSequenceRanking.from_pretrained(saved_folder)
    before = base.predict(pairs)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert adapted.predict(pairs).tolist() == pytest.approx(merged.predict(pairs).tolist(), abs=1e-5)
    assert (merged.predict(pairs) - before).abs().max() > 1e-3
    assert_moved_from_layer_1_on(merged, saved_folder)


def test_all_weights_from_a_layer_on(saved_folder, rows, tmp_path):
    out = tmp_path / "out"
    settings = ["--model", str(saved_folder), "--train", rows, "--first_layer", "1", "--learning_rate", "1e-2"]
    main([*settings, "--output_dir", str(out), *QUICK])
    assert_moved_from_layer_1_on(QueritForSequenceRanking.from_pretrained(out / "model"), saved_folder)


def assert_moved_from_layer_1_on(model, folder):
    before = dict(QueritForSequenceRanking.from_pretrained(folder).named_parameters())
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or "embed" in name:
            assert parameter.equal(before[name]), name
        elif "q_proj" in name:
            assert not parameter.equal(before[name]), name


def test_resumes_from_a_checkpoint(saved_folder, rows, tmp_path):
    common = ["--model", str(saved_folder), "--train", rows, *QUICK[2:-2], "--learning_rate", "1e-2"]
    common += ["--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    main([*common, "--output_dir", whole, "--max_steps", "4"])
    main([*common, "--output_dir", parts, "--max_steps", "2"])
    main([*common, "--output_dir", parts, "--max_steps", "4", "--resume_from_checkpoint", f"{parts}/checkpoint-2"])
    pairs = [("number 1", "this is 1"), ("number 1", "x")]
    expected = QueritForSequenceRanking.from_pretrained(f"{whole}/model").predict(pairs)
    resumed = QueritForSequenceRanking.from_pretrained(f"{parts}/model").predict(pairs)
    assert resumed.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_an_unknown_setting_is_named(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("modle: mini\n")
    with pytest.raises(ValueError, match="'modle' is no setting"):
        main([str(config)])


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "loss", "message"),
    [
        ([2, 0], "pointwise_bce", r"pointwise_bce needs labels in \[0, 1\], but they go from 0 to 2"),
    ],
)
def test_labels_that_a_loss_cannot_take(saved_folder, tmp_path, labels, loss, message):
    write_jsonl([{"query": "a", "documents": ["b", "c"], "labels": labels}], tmp_path / "rows.jsonl")
    common = [
        "--model",
        str(saved_folder),
        "--train",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ValueError, match=message):
        main([*common, "--losses", loss, *QUICK])
    assert not (tmp_path / "out").exists()


def test_no_rows(saved_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no rows in .*rows\.jsonl"):
        main(
            [
                "--model",
                str(saved_folder),
                "--train",
                str(tmp_path / "rows.jsonl"),
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["0", "2"])
def test_nothing_is_trained_above_the_last_layer(saved_folder, rows, tmp_path, rank):
    common = ["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK]
    with pytest.raises(ValueError, match="has layers 0 to 1"):
        main([*common, "--lora_rank", rank, "--first_layer", "2"])


def test_validation_and_early_stopping(saved_folder, rows, collection, tmp_path):
    out = tmp_path / "out"
    settings = ["--model", str(saved_folder), "--train", rows, "--validation", collection, "--output_dir", str(out)]
    settings += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    settings += ["--metric_for_best_model", "ndcg_at_10", "--load_best_model_at_end", "True", "--learning_rate", "0"]
    settings += ["--early_stopping_patience", "1", "--max_steps", "9", *QUICK[2:-2]]
    trainer = train(*parse(settings))
    # Nothing gets better at learning rate 0.
    assert trainer.state.global_step == 2
    names = {name for log in trainer.state.log_history for name in log}
    assert {"eval_beir_ndcg_at_10", "eval_beir_mrr_at_10", "eval_beir_loss", "eval_ndcg_at_10"} <= names


def test_teacher_scores_are_distilled(saved_folder, tmp_path):
    scores = [
        {"query": row["query"], "documents": row["documents"], "scores": {"a": [9, 1], "b": [0.1, 0.9]}} for row in ROWS
    ]
    write_jsonl(scores, tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    settings = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(out), *QUICK]
    trainer = train(*parse([*settings, "--teacher_weights", '{"a": 3, "b": 1}']))
    teachers = json.loads((out / "teachers.json").read_text())
    assert {name: each["weight"] for name, each in teachers.items()} == {"a": 3, "b": 1}
    batch = trainer.data_collator(scores[:1])
    assert batch["labels"].tolist() == pytest.approx([0.75, 0.25])
    with pytest.raises(ValueError, match="No row has scores of teacher 'c'"):
        main([*settings, "--teacher_weights", '{"c": 1}', "--output_dir", str(tmp_path / "other")])


def test_judged_rows_are_validated_by_their_labels(saved_folder, tmp_path):
    """Though the run learns from scores, which these rows have too."""
    row = {"query": "a", "documents": ["b", "c"], "scores": {"t": [1, 0]}}
    write_jsonl([row], tmp_path / "rows.jsonl")
    write_jsonl([row | {"labels": [0, 1]}], tmp_path / "dev.jsonl")
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "o")]
    given += ["--validation", str(tmp_path / "dev.jsonl"), "--eval_strategy", "steps", "--eval_steps", "2"]
    trainer = train(*parse([*given, *QUICK]))
    batch = trainer.data_collator([trainer.eval_dataset["dev"][0]])
    assert batch["labels"].tolist() == [0, 1]


def test_broken_rows_do_not_end_a_run(saved_folder, rows, tmp_path, caplog):
    with open(rows, "a") as file:
        file.write("{broken\n")
    out = tmp_path / "out"
    main(["--model", str(saved_folder), "--train", rows, "--output_dir", str(out), *QUICK])
    assert "1 broken rows were set aside" in caplog.text
    assert f"{rows}, line 7" in json.loads((out / "rejects.jsonl").read_text())["error"]
    assert list(read_rows(out / "train_rows.jsonl")) == ROWS


def test_streaming(saved_folder, rows, tmp_path):
    pytest.importorskip("datasets")
    out = tmp_path / "out"
    common = ["--model", str(saved_folder), "--train", rows, "--output_dir", str(out), "--streaming", "True"]
    main([*common, *QUICK])
    assert (out / "model" / "model.safetensors").exists()
    assert json.loads((out / "train.json").read_text())["sha256"].keys() == {rows}
    with pytest.raises(ValueError, match="streaming needs --max_steps"):
        main([*common, *QUICK[2:], "--output_dir", str(tmp_path / "other")])


@pytest.mark.parametrize("text", ["", "no row\n"], ids=["empty", "broken"])
def test_a_stream_without_rows_ends(saved_folder, tmp_path, text):
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text(text)
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "o")]
    with pytest.raises(ValueError, match="There are no rows in"):
        main([*given, "--streaming", "True", *QUICK])


def test_documents_of_rows_are_drawn_by_bands(saved_folder, tmp_path):
    row = {"query": "a", "documents": [f"d{n}" for n in range(20)], "labels": [0] * 10 + [1] + [0] * 9}
    write_jsonl([row], tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    common = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(out), *QUICK]
    main([*common, "--sample_rows", "True", "--top", "2", "--top_depth", "4", "--middle", "1", "--depth", "8"])
    (drawn,) = read_rows(out / "train_rows.jsonl")
    places = [int(each[1:]) for each in drawn["documents"]]
    assert len(places) == 5
    assert 10 in places
    assert drawn["labels"] == [int(place == 10) for place in places]
    assert len([place for place in places if place < 4]) == 2
    assert len([place for place in places if 4 <= place < 8]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--freeze", "head"], "choose router or experts"),
        (["--bias_update_rate", "0.1", "--lora_rank", "2"], "an adapter does not hold"),
        (["--teacher_weights", "bm25"], "teacher_weights is 'bm25'"),
        (["--teacher_weights", '{"bm25": 1}'], "are for rows of scores, but the first row has labels"),
        (["--limit", "-1"], "limit is -1: it has to be at least 1"),
        (["--losses", "ranknet", "ranknet"], "name each once, and weigh it by loss_weights"),
        (["--save_only_model", "True", "--resume", "True"], "keeps no state of the optimizer"),
        (["--top", "0", "--random", "0"], "draws no document"),
    ],
)
def test_settings_that_cannot_be_meant(saved_folder, rows, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        main(["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK, *settings])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validation", "x.jsonl"], "nothing says when: add --eval_strategy"),
        (["--early_stopping_patience", "2"], "early_stopping_patience needs --validation"),
        (
            ["--validation", "x.jsonl", "--eval_strategy", "steps", "--metric_for_best_model", "ndcg@10"],
            "metric_for_best_model is 'ndcg@10': choose loss, ndcg_at_10",
        ),
        (["--margin_scale", "-1"], "margin_scale is -1.0: it has to be above 0"),
    ],
)
def test_settings_that_come_to_nothing_are_named(saved_folder, rows, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK, *more])
    assert not (tmp_path / "out").exists()


def test_secrets_are_not_written_down(saved_folder, rows, tmp_path):
    out = tmp_path / "out"
    main(["--model", str(saved_folder), "--train", rows, "--output_dir", str(out), *QUICK, "--hub_token", "hf_secret"])
    assert "hf_secret" not in (out / "train.json").read_text()


def test_rows_of_another_kind_are_set_aside(saved_folder, tmp_path):
    row = {"query": "a", "documents": ["b", "c"]}
    mixed = [row | {"labels": [1, 0]}, row | {"scores": {"t": [1, 0]}}, row | {"labels": [0, 1]}]
    write_jsonl(mixed, tmp_path / "rows.jsonl")
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl")]
    main([*given, "--output_dir", str(tmp_path / "out"), *QUICK])
    assert len(list(read_rows(tmp_path / "out" / "train_rows.jsonl"))) == 2
    assert (
        "Row 2 of those to train on: no 'labels', which the first row has"
        in (tmp_path / "out" / "rejects.jsonl").read_text()
    )


def test_yaml_says_no(saved_folder, rows, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {saved_folder}\ntrain: [{rows}]\noutput_dir: {tmp_path}/out\nsave_strategy: no\n")
    _, _, _, args = parse([str(config)])
    assert args.save_strategy == "no"


def test_a_stream_goes_on_in_a_later_pass(saved_folder, rows, tmp_path):
    """Six rows are read again and again: step 8 of two queries each is in the third pass."""
    given = ["--model", str(saved_folder), "--train", rows, *QUICK, "--streaming", "True", "--save_strategy", "steps"]
    given += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"]
    main([*given, "--output_dir", str(tmp_path / "whole"), "--max_steps", "11", "--save_steps", "8"])
    main([*given, "--output_dir", str(tmp_path / "parts"), "--max_steps", "8", "--save_steps", "8"])
    resumed = ["--max_steps", "11", "--save_steps", "8", "--resume", "True"]
    main([*given, "--output_dir", str(tmp_path / "parts"), *resumed])
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


def test_a_ruined_run_writes_no_model(saved_folder, tmp_path):
    write_jsonl([{"query": "a", "documents": ["b", "c"], "labels": [1, 0]}], tmp_path / "rows.jsonl")
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=r"Stopped at step .* not finite.* No model was written"):
        main([*given, *QUICK, "--max_steps", "30", "--learning_rate", "1e38", "--warmup_steps", "0"])
    assert not (tmp_path / "o" / "model").exists()


@pytest.mark.parametrize(
    "row", [{"labels": [1, 1]}, {"scores": {"t": [0.5, 0.5], "u": [2, None]}}], ids=["labels", "scores"]
)
def test_rows_that_teach_nothing_are_counted(saved_folder, tmp_path, caplog, row):
    alike, other = [{"query": "a", "documents": ["b", "c"]} | row for _ in range(2)]
    path = tmp_path / "rows.jsonl"
    given = ["--model", str(saved_folder), "--train", str(path), "--output_dir", str(tmp_path / "out"), *QUICK]
    write_jsonl([alike], path)
    with pytest.raises(ValueError, match="No query has two different labels, so pairwise_hinge would learn nothing"):
        main([*given, "--losses", "pairwise_hinge"])
    other |= {key: [1, 0] if key == "labels" else {"t": [1, 0], "u": None} for key in row}
    write_jsonl([alike, other], path)
    main([*given, "--losses", "pairwise_hinge"])
    assert "1 of 2 queries have no two different labels" in caplog.text


def test_a_run_does_not_go_on_with_other_rows(saved_folder, tmp_path, monkeypatch):
    """What is drawn, mined and guarded may differ though no file that was named has changed."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(ROWS, path)
    given = ["--model", str(saved_folder), "--train", str(path), "--output_dir", str(tmp_path / "out"), *QUICK]
    given += ["--save_strategy", "steps", "--save_steps", "1"]
    main(given)
    monkeypatch.setattr("modeling_querit.training.preparation.training_rows", lambda *_: ROWS[:5])
    with pytest.raises(ValueError, match=r"train_rows\.jsonl has changed since the run"):
        main([*given, "--resume", "True"])


def test_a_run_does_not_go_on_with_other_processes(saved_folder, rows, tmp_path):
    given = ["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK]
    given += ["--save_strategy", "steps", "--save_steps", "1"]
    main(given)
    record = tmp_path / "out" / "train.json"
    record.write_text(record.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match="was begun by 2 processes, not 1"):
        main([*given, "--resume", "True"])


def test_a_model_is_not_written_over(saved_folder, rows, tmp_path):
    given = ["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK]
    main(given)
    with pytest.raises(ValueError, match="model is there: name another output_dir"):
        main([*given, "--seed", "1"])


@pytest.mark.parametrize(
    ("metric", "message"),
    [("foo_ndcg_at_10", "what is validated is dev"), ("ndcg_at_10", "no row to validate on has a label above 0")],
)
def test_a_metric_that_will_not_be_there(saved_folder, rows, tmp_path, metric, message):
    write_jsonl([{"query": "a", "documents": ["b", "c"], "labels": [0, 0]}], tmp_path / "dev.jsonl")
    given = ["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK]
    given += ["--validation", str(tmp_path / "dev.jsonl"), "--eval_strategy", "steps", "--eval_steps", "1"]
    with pytest.raises(ValueError, match=message):
        main([*given, "--metric_for_best_model", metric])


def test_adapters_reach_the_attention_of_mixtures(saved_folder, rows, tmp_path):
    given = ["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK]
    main([*given, "--lora_rank", "2"])
    adapted = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")}
    linear = {
        name.rpartition(".")[2]
        for name, module in QueritForSequenceRanking.from_pretrained(saved_folder).model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linear <= adapted


def test_a_stream_of_two_kinds_goes_on(saved_folder, tmp_path):
    pytest.importorskip("datasets")
    write_jsonl([*ROWS, {"query": "a", "documents": ["b", "c"], "scores": {"t": [1, 0]}}], tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(out), *QUICK]
    main([*given, "--streaming", "True", "--max_steps", "4", "--per_device_train_batch_size", "2"])
    assert "Row 7 of those to train on: no 'labels'" in (out / "rejects_of_stream.jsonl").read_text()


def test_tables_with_columns_that_json_has_not(saved_folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = [row | {"when": datetime.datetime(2026, 1, 1), "raw": b"x"} for row in ROWS]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.parquet")]
    main([*given, "--output_dir", str(tmp_path / "out"), *QUICK])
    assert len(list(read_rows(tmp_path / "out" / "train_rows.jsonl"))) == len(ROWS)


def test_a_folder_that_is_a_file(saved_folder, rows, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        main(["--model", str(saved_folder), "--train", rows, "--output_dir", str(tmp_path / "out"), *QUICK])


def test_a_row_that_no_teacher_scored_is_set_aside(saved_folder, tmp_path):
    row = {"query": "a", "documents": ["b", "c"]}
    mixed = [row | {"scores": {"t": [1, 0]}}, row | {"labels": [1, 0], "scores": {"t": None}}]
    write_jsonl(mixed, tmp_path / "rows.jsonl")
    given = ["--model", str(saved_folder), "--train", str(tmp_path / "rows.jsonl")]
    main([*given, "--output_dir", str(tmp_path / "out"), *QUICK])
    assert "Row 2 of those to train on: no 'scores'" in (tmp_path / "out" / "rejects.jsonl").read_text()
