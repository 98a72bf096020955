import pytest
import yaml
from small_adaptations import make_settings, make_values

from modeling_querit.adaptation.settings import AdaptSettings, construct
from modeling_querit.checkpoints.mini import MINI_NAME


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"corpus": {"sampel": 3}}, r"corpus.sampel is not a setting"),
        ({"corpus": {"sample": 0}}, r"corpus.sample: Input should be greater"),
        ({"corpus": {"source": ""}}, r"corpus.source is empty: give a value"),
        ({"corpus": {"source": []}}, r"corpus.source: List should have at least 1"),
        ({"queries": {"per_document": "many"}}, r"queries.per_document: Input should be a valid integer"),
        ({"queries": {"styles": {"title": float("inf")}}}, r"queries.styles.title: Input should be a finite"),
        ({"queries": {"generators": {"transformers": {"model": ""}}}}, r"generators.transformers.model is empty"),
        ({"candidates": {"first_stages": []}}, r"candidates.first_stages: List should have at least 1"),
        ({"candidates": {"first_stages": [" "]}}, r"candidates.first_stages is empty: give"),
        ({"teachers": {"bm25": {"weight": -1}}}, r"teachers.bm25.weight: Input should be greater"),
        ({"teachers": {"bm25": {"weight": float("inf")}}}, r"teachers.bm25.weight: Input should be a finite"),
        ({"teachers": {"cross-encoder": {"model": 3}}}, r"teachers.cross-encoder: .*model is 3"),
        ({"train": {"model": None}}, r"train: .*model is None"),
        ({"train": {"seed": 3}}, r"train.seed comes from another section"),
        ({"seed": -1}, r"seed: Input should be greater"),
        ({"seed": 2**32}, r"seed: Input should be less"),
    ],
)
def test_invalid_settings_are_named(tmp_path, section, message):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values(tmp_path, "model", **section)))
    with pytest.raises(ValueError, match=message):
        AdaptSettings.load(config)


def test_a_misspelt_section_is_named_before_what_is_missing(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("corpos:\n  source: x\n")
    with pytest.raises(ValueError, match=r"config.yaml: corpos is not a setting; see docs/adapt.md"):
        AdaptSettings.load(config)
    config.write_text("corpus:\n  source: x\n")
    with pytest.raises(ValueError, match=r"config.yaml: output_dir is missing: add it"):
        AdaptSettings.load(config)


@pytest.mark.parametrize("values", [{}, {"queries": {"round_trip": 0}, "evaluation": ["collection:test"]}])
def test_runs_alone_cannot_rank_other_queries(tmp_path, values):
    with pytest.raises(ValueError, match="first_stages are TREC runs only"):
        make_settings(tmp_path, "x", candidates={"first_stages": ["a.run"]}, **values)


def test_runs_alone_are_enough_without_a_round_trip(tmp_path):
    values = {"candidates": {"first_stages": ["a.run"]}, "queries": {"round_trip": 0}}
    assert make_settings(tmp_path, "x", **values).candidates.first_stages == ["a.run"]


def test_local_models_are_those_of_the_sections(tmp_path):
    server = {"type": "endpoint", "url": "http://localhost/v1", "model": "remote"}
    settings = make_settings(
        tmp_path,
        "student",
        queries={"generators": {"extractive": {}, "transformers": {"model": "writer"}, "endpoint": server}},
        candidates={"first_stages": ["bm25", "encoder", "a.trec"]},
        teachers={
            "bm25": {},
            "cross-encoder": {},
            "server": server,
            "student": {"type": "cross-encoder", "model": "s"},
        },
    )
    assert settings.local_models(["corpus"]) == []
    assert settings.local_models(["queries"]) == ["writer"]
    assert settings.local_models(["candidates"]) == ["bm25", "encoder"]
    # A cross-encoder without a model is the default one.
    assert settings.local_models(["teachers"]) == ["bm25", "s", MINI_NAME]
    assert settings.local_models(["train"]) == ["student"]


class Echo:
    def __init__(self, word: str):
        self.word = word


def test_a_registered_class_is_constructed_by_its_type():
    assert construct({"echo": Echo}, "echo", {"word": "hello"}, "queries.generators.e").word == "hello"
    with pytest.raises(ValueError, match=r"queries.generators.e: type is 'ech': choose from echo\."):
        construct({"echo": Echo}, "ech", {}, "queries.generators.e")
    with pytest.raises(ValueError, match=r"queries.generators.e: .*unexpected keyword argument 'loud'"):
        construct({"echo": Echo}, "echo", {"word": "hello", "loud": True}, "queries.generators.e")
