from pathlib import Path

import pytest

from modeling_querit.evaluation.mteb_tasks import Benchmark
from modeling_querit.evaluation.settings import EvaluationSettings

ROOT = Path(__file__).parents[2]


def test_a_file_and_what_overrides_it(tmp_path):
    path = tmp_path / "evaluate.yaml"
    path.write_text("models: mini\ncollections: [a:dev]\nbenchmarks:\n- BEIR\n- {name: X, task_types: [Reranking]}\n")
    settings = EvaluationSettings.load(path, {"depth": 7, "output": "out"})
    assert (settings.models, settings.depth, settings.output) == (("mini",), 7, Path("out"))
    assert settings.benchmarks == (Benchmark("BEIR"), Benchmark("X", ("Reranking",)))


def test_the_paper_s_protocol_is_a_file():
    settings = EvaluationSettings.load(ROOT / "examples/evaluate_paper.yaml", {})
    assert settings.models == ("Querit/Querit", "Querit/Querit-4B")
    assert (settings.first_stage, settings.depth) == ("Qwen/Qwen3-Embedding-0.6B", 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "at least one model"),
        ({"models": "mini"}, "what to evaluate on"),
        ({"models": "mini", "collections": "a", "depth": 0}, "depth is 0: it is at least 1"),
        ({"models": "mini", "collections": "a", "depth": True}, "depth is True: it is a whole number"),
        ({"models": "mini", "collections": "a", "first_stage": 1}, "first_stage is 1: it is a text"),
        ({"models": "mini", "collections": [1]}, "collections holds 1"),
        ({"models": "mini", "collections": "a", "dtype": "int4"}, "dtype is 'int4': choose from auto"),
        ({"models": "mini", "benchmarks": [{"task_types": []}]}, "a benchmark has a name"),
        ({"models": "mini", "collections": "a", "int8": 3}, "int8 is 3: it is true or false"),
    ],
)
def test_settings_that_are_not_possible(values, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings.parse(values)


def test_an_unknown_setting_is_refused_by_name(tmp_path):
    (tmp_path / "x.json").write_text('{"models": "mini", "deep": 3}')
    with pytest.raises(ValueError, match=r"x\.json: there is no setting 'deep'"):
        EvaluationSettings.load(tmp_path / "x.json", {})


def test_models_are_called_after_as_much_of_their_path_as_tells_them_apart(tmp_path):
    folders = [tmp_path / "law/model", tmp_path / "code/model", tmp_path / "other"]
    for folder in folders:
        folder.mkdir(parents=True)
    models = [str(folder) for folder in folders]
    settings = EvaluationSettings((*models, "mini", "a/b"), ("x",))
    assert list(settings.model_names()) == ["law/model", "code/model", tmp_path.name + "/other", "mini", "a/b"]
    assert list(EvaluationSettings((models[0],), ("x",)).model_names()) == ["model"]
    with pytest.raises(ValueError, match="named twice"):
        EvaluationSettings((models[0], models[0] + "/"), ("x",)).model_names()


def test_two_collections_of_one_name_are_refused(tmp_path):
    settings = EvaluationSettings(("mini",), (f"{tmp_path}/a/x:dev", f"{tmp_path}/b/x:dev"))
    with pytest.raises(ValueError, match="Two collections are called x:dev"):
        settings.sources([])


def test_collections_and_models_that_would_share_files_are_refused(tmp_path):
    settings = EvaluationSettings(("mini",), (f"{tmp_path}/a_b:test", f"{tmp_path}/a:b_test"))
    with pytest.raises(ValueError, match="Collections a_b:test and a:b_test would share files"):
        settings.sources([])
    for models, message in {
        ("a/b", "a_b"): "Models a/b and a_b would share files",
        ("mini", "first_stage"): "cannot be called 'first_stage'",
        ("qrels",): "cannot be called 'qrels'",
    }.items():
        with pytest.raises(ValueError, match=message):
            EvaluationSettings(models, ("x",)).model_names()
