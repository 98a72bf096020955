"""Cards of merged and converted models: metadata for the Hub, and no local paths."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard

from modeling_querit.cards import (
    InheritedMetadata,
    combine_inherited,
    merged_card,
    read_inherited,
    seq_cls_card,
    stub_card,
)
from modeling_querit.merging.recipe import Recipe

TAGS = ["reranker", "cross-encoder", "sentence-transformers", "querit"]


def recipe(*models, **settings):
    """The fields of a recipe in merge.json."""
    return Recipe(models, **settings).public()


def merged(*models, **settings):
    return ModelCard(merged_card("mixture", recipe(*models, **settings)))


def exported(source, bias=0.25):
    return ModelCard(seq_cls_card("export", "Qwen3ForSequenceClassification", source, bias))


CARDS = {
    "slerp": lambda: merged("mini", "somebody/reranker"),
    "linear": lambda: merged("a", "b", "c", method="linear", weights=["1,2,1"]),
    "task arithmetic": lambda: merged("a", "b", method="task_arithmetic", base="some/base", scale=0.5),
    "export": lambda: exported("somebody/reranker"),
    "export of a folder": lambda: exported("."),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_have_the_front_matter_of_a_reranker(name):
    data = CARDS[name]().data
    assert data.pipeline_tag == "text-ranking"
    assert data.library_name == "transformers"
    assert data.tags == (TAGS if name.startswith("export") else [*TAGS, "merge"])
    # The licence is that of the parents.
    assert data.license is None


@pytest.mark.parametrize("name", CARDS)
def test_cards_have_a_title_and_code_that_parses(name):
    card = CARDS[name]()
    title = "export" if name.startswith("export") else "mixture"
    assert card.text.lstrip().startswith(f"# {title}\n")
    assert "arxiv.org/abs/2606.19037" in card.text
    assert f'CrossEncoder("{title}"' in card.text
    assert not re.search(r"\{\w+\}", card.text)
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        ast.parse(block)


def test_only_merged_models_need_remote_code():
    assert "trust_remote_code" not in exported("mini").text
    assert 'CrossEncoder("mixture", trust_remote_code=True)' in merged("a", "b").text


# Base models


def test_repositories_are_base_models():
    assert exported("somebody/reranker").data.base_model == "somebody/reranker"
    data = merged("somebody/one", "other.one/two_2").data
    assert data.base_model == ["somebody/one", "other.one/two_2"]
    assert data.base_model_relation == "merge"


def test_the_base_of_task_vectors_is_a_base_model():
    card = merged("some/one", "some/two", method="task_arithmetic", base="some/base")
    assert card.data.base_model == ["some/base", "some/one", "some/two"]
    assert "with the task vectors taken from `some/base`" in card.text


@pytest.mark.parametrize(
    "name", ["mini", "nameless", "../reranker", "a/b/c", "some--body/x", "-a/b", "/absolute", "x/"]
)
def test_other_names_are_not_base_models(name):
    assert exported(name).data.base_model is None
    data = merged(name, "somebody/reranker").data
    assert data.base_model == ["somebody/reranker"]
    assert merged(name, "mini").data.base_model is None
    assert "base_model" not in merged(name, "mini").data.to_dict()


def test_a_folder_named_like_a_repository_is_not_a_base_model(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert exported("runs/mine").data.base_model is None
    assert merged("runs/mine", "mini").data.base_model is None
    monkeypatch.chdir("/")
    assert exported("runs/mine").data.base_model == "runs/mine"


@pytest.mark.parametrize("ending", ["", "/", "/.", "/../mine"])
def test_folders_are_named_without_their_paths(tmp_path, ending):
    folder = tmp_path / "secret" / "mine"
    folder.mkdir(parents=True)
    source = f"{folder}{ending}"
    for card in (
        exported(source),
        merged(source, "some/one"),
        merged("a", "b", method="task_arithmetic", base=source),
    ):
        assert "`mine`" in card.text
        for path in (str(tmp_path), "secret"):
            assert path not in str(card)


def test_the_working_directory_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert "`mine`, a Querit reranker" in exported(".").text
    assert "- `mine`\n" in merged(".", "some/one").text


# Text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"t": ["0.4"]}, "(slerp, t 0.4)"),
        ({}, "(slerp)"),
        ({"t": ["0.5", "mlp=0:1"]}, "(slerp, t 0.5 mlp=0:1)"),
        ({"method": "linear", "weights": ["1,2"]}, "(linear, weights 1,2)"),
        ({"method": "task_arithmetic", "base": "x", "scale": 0.7}, "(task_arithmetic, scale 0.7)"),
        ({"method": "task_arithmetic", "base": "x"}, "(task_arithmetic, scale 1.0)"),
    ],
)
def test_the_card_states_how_models_were_merged(settings, expected):
    text = merged("one", "two", **settings).text
    assert f"merged by `querit merge` {expected} from\n\n- `one`\n- `two`\n" in text


@pytest.mark.parametrize(("bias", "text"), [(0.25, "0.25"), (-1 / 3, "-0.333333"), (0.0, "0"), (1e-9, "1e-09")])
def test_the_card_states_the_bias(bias, text):
    assert f"The logit has a bias, {text}. vLLM adds it" in exported("mini", bias).text


def test_the_card_states_the_class():
    assert "as `Qwen3ForSequenceClassification` with one\nlabel" in exported("mini").text


# What models pass on


def write_model(folder, front_matter, **files):
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n# A model\n")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_licence_languages_base_model_and_notice_are_passed_on(tmp_path):
    front_matter = "license: gemma\nbase_model: google/gemma\nbase_model_relation: finetune\nlanguage: [de, en]"
    folder = write_model(tmp_path / "model", front_matter, NOTICE="Gemma is provided under its terms.", LICENSE="text")
    inherited = read_inherited(folder)
    for card in (
        stub_card("new", inherited),
        merged_card("new", recipe("./a", "./b"), inherited),
        seq_cls_card("new", "Gemma3ForSequenceClassification", "mini", 0.0, inherited),
    ):
        data = ModelCard(card).data.to_dict()
        assert (data["license"], data["base_model"], data["language"]) == ("gemma", "google/gemma", ["de", "en"])
        assert data["base_model_relation"] == "finetune"
        assert "Gemma is provided under its terms." in card
    inherited.write(tmp_path)
    assert (tmp_path / "LICENSE").read_text() == "text"


def test_what_is_inherited_from_several_models_is_combined(tmp_path):
    first = write_model(tmp_path / "a", "license: gemma\nbase_model: google/gemma\nlanguage: de", NOTICE="one")
    second = write_model(tmp_path / "b", "license: mit\nbase_model: me/base\nlanguage: [en, de]", NOTICE="two")
    inherited = combine_inherited([read_inherited(first), read_inherited(second), read_inherited(first)])
    assert inherited.data["license"] == "other"
    assert inherited.data["license_name"] == "gemma-and-mit"
    assert inherited.data["language"] == ["de", "en"]
    assert inherited.data["base_model"] == ["google/gemma", "me/base"]
    assert inherited.files == {"NOTICE": "one", "NOTICE-2": "two"}
    assert "one\n\ntwo" in inherited.section


@pytest.mark.parametrize("card", ["", "no front matter", "---\n[\n---\n", "---\nbase_model: /home/me/base\n---\n"])
def test_nothing_is_inherited_from_an_empty_card(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert read_inherited(tmp_path) == InheritedMetadata()


HOSTILE = '<script>`a`"\n# b'


def test_names_in_cards_are_no_markup():
    recipe = {"base": None, "models": [HOSTILE, "me/b"], "method": "slerp", "t": ["0.5"], "weights": (), "scale": 1.0}
    for card in (merged_card(HOSTILE, recipe), seq_cls_card(HOSTILE, "Qwen3ForSequenceClassification", HOSTILE, 0.5)):
        text, *programs = card.partition("---\n\n")[2].split("```python")
        assert '# &lt;script&gt;\\`a\\`" # b\n' in text
        assert '``<script>`a`" # b``' in text
        assert "\n# b" not in card
        for program in programs:
            compile(program.partition("```")[0], "card", "exec")
            assert json.dumps(HOSTILE) in program
