"""Card templates: front matter for the Hub, metrics from results files, code that runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from huggingface_hub import ModelCard

from modeling_querit.cards import find_card, find_card_problems, render_card
from modeling_querit.saving_querit import CARD_STUB, USAGE

ROOT = Path(__file__).parents[1]
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
- {file: metrics.json, column: ours, metric: ndcg_at_10, name: nDCG@10, scale: 100}
---
# {name}

<!-- results -->
"""
RESULTS = {
    "source": {"name": "a report", "url": "https://example.org/report"},
    "rows": [{"collection": "law", "ours": 0.51234}, {"collection": "news", "ours": 0.4}],
}


@pytest.fixture
def card(tmp_path):
    """A card in a folder beside its results file."""
    (tmp_path / "metrics.json").write_text(json.dumps(RESULTS))
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "card.md").write_text(CARD)
    return tmp_path / "cards" / "card.md"


def test_metrics_come_from_the_results_file(card):
    rendered = render_card(card, "me/mine")
    assert "# me/mine" in rendered
    assert "| law | nDCG@10 | 51.23 |" in rendered
    data = ModelCard(rendered).data
    assert "results" not in data.to_dict()
    assert [(metric.dataset_name, metric.metric_value) for metric in data.eval_results] == [
        ("law", 51.23),
        ("news", 40.0),
    ]
    assert {metric.source_url for metric in data.eval_results} == {"https://example.org/report"}
    assert find_card_problems(rendered) == []


def test_a_results_file_in_the_working_directory_comes_first(card, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("metrics.json").write_text(json.dumps({"rows": [{"collection": "law", "ours": 0.9}]}))
    assert "| law | nDCG@10 | 90.00 |" in render_card(card, "me/mine")


def test_a_card_is_found_as_a_file_or_as_a_template(card, monkeypatch):
    assert find_card(str(card)) == card
    assert find_card("adapted").read_text() == (ROOT / "hub_cards" / "adapted.md").read_text()
    monkeypatch.chdir(card.parent)
    with pytest.raises(FileNotFoundError, match=r"no card other: .* one of the templates 4b, a0_4b, adapted, mini\.$"):
        find_card("other")


def test_a_missing_column_is_named(card, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [{"collection": "law"}]}))
    with pytest.raises(ValueError, match=r"metrics\.json: the row of law has no 'ours'"):
        render_card(card, "me/mine")


def test_a_missing_results_file_is_named(card, tmp_path):
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        render_card(card, "me/mine")


def test_a_table_without_results_is_refused(card):
    card.write_text(re.sub(r"results:\n.*\n", "", CARD))
    with pytest.raises(ValueError, match="go together"):
        render_card(card, "me/mine")


def test_results_without_a_table_are_refused(card):
    card.write_text(CARD.replace("<!-- results -->", ""))
    with pytest.raises(ValueError, match="go together"):
        render_card(card, "me/mine")


@pytest.mark.parametrize("entry", ["metrics.json", "{column: ours, metric: x}", "{file: metrics.json, metric: x}"])
def test_an_incomplete_entry_is_refused(card, entry):
    card.write_text(re.sub(r"- \{file: .*", f"- {entry}", CARD))
    with pytest.raises(ValueError, match="an entry of results has no"):
        render_card(card, "me/mine")


@pytest.mark.parametrize("content", [[], {}, {"rows": {}}, {"rows": [{"collection": "law", "ours": None}]}])
def test_a_file_without_results_is_refused(card, tmp_path, content):
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"metrics\.json"):
        render_card(card, "me/mine")


@pytest.mark.parametrize("content", ['{"rows": [1]}', '{"rows": [], "source": "a report"}', "rows", '{"rows": ['])
def test_a_malformed_results_file_is_refused(card, tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        render_card(card, "me/mine")


@pytest.mark.parametrize("change", ["file: 7", "file: metrics.json, scale: percent", "file: metrics.json, scale: true"])
def test_an_entry_of_wrong_types_is_refused(card, change):
    card.write_text(re.sub(r"- \{file: .*", f"- {{{change}, column: ours, metric: x}}", CARD))
    with pytest.raises(ValueError, match="file must be the name of a file, and scale a number"):
        render_card(card, "me/mine")


@pytest.mark.parametrize("key", ["license", "library_name", "pipeline_tag", "language", "tags"])
def test_a_missing_key_is_named(card, key):
    card.write_text(re.sub(rf"(?m)^{key}: .*\n", "", CARD))
    assert find_card_problems(render_card(card, "me/mine")) == [f"README.md does not state {key} in its front matter."]


@pytest.mark.parametrize(
    ("keys", "missing"), [("base_model(_relation)?", "base_model"), ("base_model_relation", "base_model_relation")]
)
def test_base_model_and_relation_are_required(card, keys, missing):
    card.write_text(re.sub(rf"(?m)^{keys}: .*\n", "", CARD))
    (problem,) = find_card_problems(render_card(card, "me/mine"))
    assert problem.startswith(f"README.md does not state {missing} ")


def test_a_wrong_task_and_language_are_named(card):
    card.write_text(CARD.replace("text-ranking", "text-generation").replace("[en, de]", "English"))
    problems = find_card_problems(render_card(card, "me/mine"))
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
def test_values_that_the_hub_does_not_know_are_named(card, change, named):
    card.write_text(re.sub(rf"(?m)^{change[0]}$", change[1], CARD))
    (problem,) = find_card_problems(render_card(card, "me/mine"))
    assert named in problem


def test_the_stub_is_not_a_card():
    assert any("is the stub" in problem for problem in find_card_problems(CARD_STUB + USAGE))


def test_a_card_that_was_not_rendered_is_refused(card):
    assert any("not filled in" in problem for problem in find_card_problems(card.read_text()))


def test_a_template_that_was_not_filled_in_is_refused():
    text = (ROOT / "hub_cards" / "adapted.md").read_text()
    assert any("still has TODO" in problem for problem in find_card_problems(text))


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n- a list\n---\n", "---\na: [\n---\n", "---\ntags: 5\n---\n"]
)
def test_front_matter_that_cannot_be_parsed_is_a_problem(text):
    assert find_card_problems(text)


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_the_cards_of_releases_are_complete(path):
    rendered = render_card(path, "querit/some-model")
    assert find_card_problems(rendered) == []
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


@pytest.mark.slow
def test_the_code_in_the_cards_runs_without_the_package(saved_folder, forked_python, tmp_path):
    pytest.importorskip("sentence_transformers")
    blocks = re.findall(r"```python\n(.*?)```", CARDS[0].read_text(), re.DOTALL)
    assert len(blocks) == 2
    program = "import sys\nsys.modules['modeling_querit'] = None\n" + "\n".join(blocks)
    (tmp_path / "program.py").write_text(program.replace("{name}", str(saved_folder)))
    process = subprocess.run(
        [forked_python, "-I", tmp_path / "program.py"],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert re.match(r"[+-]\d\.\d{3} ", process.stdout)


@pytest.mark.slow
def test_templates_are_in_the_wheel_and_found_there(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("modeling_querit", "hub_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta; print(setuptools.build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, check=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    find = "from modeling_querit.cards import find_card; print(find_card('adapted'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    process = subprocess.run(
        [sys.executable, "-c", find], cwd=tmp_path / "dist", env=environment, capture_output=True, text=True, check=True
    )
    installed = tmp_path / "site" / "modeling_querit" / "release" / "cards" / "adapted.md"
    assert Path(process.stdout.splitlines()[-1]) == installed
    assert installed.read_text() == (ROOT / "hub_cards" / "adapted.md").read_text()
