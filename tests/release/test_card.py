"""Cards: what the Hub reads in them, figures that come from files, and code that runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_querit.folder_querit import CARD_STUB, USAGE
from modeling_querit.release.card import problems_of_card, render_card

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "hub_cards").glob("*.md"))
RELEASED = [path for path in CARDS if path.stem != "adapted"]

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-ranking
base_model: someone/base
base_model_relation: finetune
language: [en, de]
tags: [reranker]
results:
- {file: figures.json, column: ours, metric: ndcg_at_10, name: nDCG@10, scale: 100}
---
# {name}

<!-- results -->
"""
FIGURES = {
    "source": {"name": "a report", "url": "https://example.org/report"},
    "rows": [{"collection": "law", "ours": 0.51234}, {"collection": "news", "ours": 0.4}],
}


@pytest.fixture
def card(tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
    (tmp_path / "card.md").write_text(CARD)
    return tmp_path / "card.md"


def test_figures_come_from_the_file(card, tmp_path):
    rendered = render_card(card, "me/mine", tmp_path)
    assert "# me/mine" in rendered
    assert "| law | nDCG@10 | 51.23 |" in rendered
    data = ModelCard(rendered).data
    assert "results" not in data.to_dict()
    assert [(each.dataset_name, each.metric_value) for each in data.eval_results] == [("law", 51.23), ("news", 40.0)]
    assert {each.source_url for each in data.eval_results} == {"https://example.org/report"}
    assert problems_of_card(rendered) == []


def test_a_column_that_is_not_there(card, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps({"rows": [{"collection": "law"}]}))
    with pytest.raises(ValueError, match=r"figures\.json: the row of law has no 'ours'"):
        render_card(card, "me/mine", tmp_path)


def test_a_results_file_that_is_not_there(card, tmp_path):
    (tmp_path / "figures.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"figures\.json"):
        render_card(card, "me/mine", tmp_path)


def test_a_table_without_figures(card, tmp_path):
    card.write_text(re.sub(r"results:\n.*\n", "", CARD))
    with pytest.raises(ValueError, match="go together"):
        render_card(card, "me/mine", tmp_path)


def test_figures_without_a_table(card, tmp_path):
    card.write_text(CARD.replace("<!-- results -->", ""))
    with pytest.raises(ValueError, match="go together"):
        render_card(card, "me/mine", tmp_path)


@pytest.mark.parametrize("entry", ["figures.json", "{column: ours, metric: x}", "{file: figures.json, metric: x}"])
def test_an_entry_that_says_too_little(card, tmp_path, entry):
    card.write_text(re.sub(r"- \{file: .*", f"- {entry}", CARD))
    with pytest.raises(ValueError, match="an entry of results has no"):
        render_card(card, "me/mine", tmp_path)


@pytest.mark.parametrize("found", [[], {}, {"rows": {}}, {"rows": [{"collection": "law", "ours": None}]}])
def test_what_is_no_results_file(card, tmp_path, found):
    (tmp_path / "figures.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"figures\.json"):
        render_card(card, "me/mine", tmp_path)


@pytest.mark.parametrize("content", ['{"rows": [1]}', '{"rows": [], "source": "a report"}', "rows", '{"rows": ['])
def test_a_results_file_of_another_shape(card, tmp_path, content):
    (tmp_path / "figures.json").write_text(content)
    with pytest.raises(ValueError, match=r"figures\.json"):
        render_card(card, "me/mine", tmp_path)


@pytest.mark.parametrize("change", ["file: 7", "file: figures.json, scale: percent", "file: figures.json, scale: true"])
def test_an_entry_of_other_types(card, tmp_path, change):
    card.write_text(re.sub(r"- \{file: .*", f"- {{{change}, column: ours, metric: x}}", CARD))
    with pytest.raises(ValueError, match="file is the name of a file, and scale a number"):
        render_card(card, "me/mine", tmp_path)


@pytest.mark.parametrize("key", ["license", "library_name", "pipeline_tag", "language", "tags"])
def test_what_is_not_stated_is_named(card, tmp_path, key):
    card.write_text(re.sub(rf"(?m)^{key}: .*\n", "", CARD))
    assert problems_of_card(render_card(card, "me/mine", tmp_path)) == [
        f"README.md does not state {key} in its front matter."
    ]


@pytest.mark.parametrize(
    ("keys", "missing"), [("base_model(_relation)?", "base_model"), ("base_model_relation", "base_model_relation")]
)
def test_where_it_comes_from_and_how(card, tmp_path, keys, missing):
    card.write_text(re.sub(rf"(?m)^{keys}: .*\n", "", CARD))
    (problem,) = problems_of_card(render_card(card, "me/mine", tmp_path))
    assert problem.startswith(f"README.md does not state {missing} ")


def test_a_wrong_task_and_language(card, tmp_path):
    card.write_text(CARD.replace("text-ranking", "text-generation").replace("[en, de]", "English"))
    problems = problems_of_card(render_card(card, "me/mine", tmp_path))
    assert any("text-generation" in problem for problem in problems)
    assert any("'English'" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("base_model: .*", "base_model: /data/models/base"), "base_model"),
        (("base_model_relation: .*", "base_model_relation: cousin"), "base_model_relation"),
        (("license: .*", "license: other"), "license_name"),
    ],
)
def test_what_the_hub_would_not_understand(card, tmp_path, change, named):
    card.write_text(re.sub(rf"(?m)^{change[0]}$", change[1], CARD))
    (problem,) = problems_of_card(render_card(card, "me/mine", tmp_path))
    assert named in problem


def test_the_stub_is_no_card():
    assert any("is the stub" in problem for problem in problems_of_card(CARD_STUB + USAGE))


def test_a_card_that_was_not_rendered(card):
    assert any("not rendered" in problem for problem in problems_of_card(card.read_text()))


def test_what_was_not_filled_in():
    text = (ROOT / "hub_cards" / "adapted.md").read_text()
    assert any("left to be filled in" in problem for problem in problems_of_card(text))


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n- a list\n---\n", "---\na: [\n---\n", "---\ntags: 5\n---\n"]
)
def test_front_matter_that_cannot_be_read(text):
    assert problems_of_card(text)


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_the_cards_of_releases(path):
    rendered = render_card(path, "querit/some-model", ROOT)
    assert problems_of_card(rendered) == []
    data = ModelCard(rendered).data
    assert bool(data.eval_results) == ("results:" in path.read_text())
    assert data.pipeline_tag == "text-ranking"
    assert {"reranker", "querit"} <= set(data.tags)


def test_there_is_a_card_for_each_released_model():
    assert [path.stem for path in CARDS] == ["4b", "a0_4b", "adapted", "mini"]


def test_every_card_shows_the_same_use():
    blocks = {path.stem: re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) for path in CARDS}
    assert len(set(map(tuple, blocks.values()))) == 1
    assert all("vllm serve" in path.read_text() for path in CARDS)


def test_the_code_in_the_cards_runs_without_the_package(saved_folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    blocks = re.findall(r"```python\n(.*?)```", CARDS[0].read_text(), re.DOTALL)
    assert len(blocks) == 2
    program = "import sys\nsys.modules['modeling_querit'] = None\n" + "\n".join(blocks)
    (tmp_path / "program.py").write_text(program.replace("{name}", str(saved_folder)))
    done = subprocess.run(
        [sys.executable, "-I", tmp_path / "program.py"],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"[+-]\d\.\d{3} ", done.stdout)
