"""What the cards of merged and exported models tell the Hub, and do not tell of this machine."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from modeling_querit.checkpoints.cards import exported_card, merged_card
from modeling_querit.checkpoints.merge import Recipe

TAGS = ["reranker", "cross-encoder", "sentence-transformers", "querit"]


def recipe(*models, **settings):
    """As it stands in merge.json."""
    return Recipe(models, **settings).published()


def merged(*models, **settings):
    return ModelCard(merged_card("mixture", recipe(*models, **settings)))


def exported(source, bias=0.25):
    return ModelCard(exported_card("export", "Qwen3ForSequenceClassification", source, bias))


CARDS = {
    "slerp": lambda: merged("mini", "somebody/reranker"),
    "linear": lambda: merged("a", "b", "c", method="linear", weights=["1,2,1"]),
    "task arithmetic": lambda: merged("a", "b", method="task_arithmetic", base="some/base", scale=0.5),
    "export": lambda: exported("somebody/reranker"),
    "export of a folder": lambda: exported("."),
}


@pytest.mark.parametrize("name", CARDS)
def test_front_matter(name):
    data = CARDS[name]().data
    assert data.pipeline_tag == "text-ranking"
    assert data.library_name == "transformers"
    assert data.tags == (TAGS if name.startswith("export") else [*TAGS, "merge"])
    # What an export or a merge is licensed under, its parents say.
    assert data.license is None


@pytest.mark.parametrize("name", CARDS)
def test_body(name):
    card = CARDS[name]()
    title = "export" if name.startswith("export") else "mixture"
    assert card.text.lstrip().startswith(f"# {title}\n")
    assert "arxiv.org/abs/2606.19037" in card.text
    assert f'CrossEncoder("{title}"' in card.text
    assert not re.search(r"\{\w+\}", card.text)
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        ast.parse(block)


def test_an_export_needs_no_code_and_a_merge_does():
    assert "trust_remote_code" not in exported("mini").text
    assert 'CrossEncoder("mixture", trust_remote_code=True)' in merged("a", "b").text


# What it was made from


def test_repositories_are_base_models():
    assert exported("somebody/reranker").data.base_model == "somebody/reranker"
    data = merged("somebody/one", "other.one/two_2").data
    assert data.base_model == ["somebody/one", "other.one/two_2"]
    assert data.base_model_relation == "merge"


def test_the_base_of_task_vectors_is_one_too():
    card = merged("some/one", "some/two", method="task_arithmetic", base="some/base")
    assert card.data.base_model == ["some/base", "some/one", "some/two"]
    assert "with the task vectors taken from `some/base`" in card.text


@pytest.mark.parametrize(
    "name", ["mini", "nameless", "../reranker", "a/b/c", "some--body/x", "-a/b", "/absolute", "x/"]
)
def test_what_is_no_repository_is_no_base_model(name):
    assert exported(name).data.base_model is None
    data = merged(name, "somebody/reranker").data
    assert data.base_model == ["somebody/reranker"]
    assert merged(name, "mini").data.base_model is None
    assert "base_model" not in merged(name, "mini").data.to_dict()


def test_a_folder_that_looks_like_a_repository_is_none(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert exported("runs/mine").data.base_model is None
    assert merged("runs/mine", "mini").data.base_model is None
    monkeypatch.chdir("/")
    assert exported("runs/mine").data.base_model == "runs/mine"


@pytest.mark.parametrize("ending", ["", "/", "/.", "/../mine"])
def test_folders_are_named_by_their_last_name_alone(tmp_path, ending):
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


def test_a_folder_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert "`mine`, a Querit reranker" in exported(".").text
    assert "- `mine`\n" in merged(".", "some/one").text


# How


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
def test_how_it_was_merged(settings, expected):
    text = merged("one", "two", **settings).text
    assert f"merged by `querit merge` {expected} from\n\n- `one`\n- `two`\n" in text


@pytest.mark.parametrize(("bias", "said"), [(0.25, "0.25"), (-1 / 3, "-0.333333"), (0.0, "0"), (1e-9, "1e-09")])
def test_the_bias_of_an_export(bias, said):
    assert f"The logit has a bias, {said}. vLLM adds it" in exported("mini", bias).text


def test_the_class_of_an_export():
    assert "as `Qwen3ForSequenceClassification` with one\nlabel" in exported("mini").text
