import json
import sys

import pytest

from modeling_querit import console
from modeling_querit.ranking_querit import RankedDocument

RANKING = [RankedDocument(1, 0.5, {"title": "Fox", "text": "red\n[bold]"}), RankedDocument(0, -0.25, "ü" * 200)]


def test_a_ranking_as_json(capsys):
    console.print_ranking_json("mini", RANKING)
    assert json.loads(capsys.readouterr().out) == {
        "model": "mini",
        "results": [
            {"index": 1, "score": 0.5, "document": {"title": "Fox", "text": "red\n[bold]"}},
            {"index": 0, "score": -0.25, "document": "ü" * 200},
        ],
    }


def test_a_ranking_as_a_table(capsys):
    console.print_ranking("which [fox]", RANKING)
    title, header, first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert title == "which [fox]"
    assert header.split() == ["rank", "score", "index", "document"]
    assert first.split() == ["1", "+0.500", "1", "Fox", "red", "[bold]"]
    # Cut to one line.
    assert second.startswith("   2  -0.250      0  üüü")
    assert second.endswith("…")


@pytest.fixture
def fresh(monkeypatch):
    """As in a process where neither transformers nor torchao is imported yet."""
    for name in ("transformers", "torchao"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("config", "is_skipped"),
    [({"model_type": "querit"}, True), ({"quantization_config": {"quant_method": "torchao"}}, False), (None, False)],
)
def test_torchao_is_skipped_for_folders_that_do_not_need_it(fresh, monkeypatch, tmp_path, config, is_skipped):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    console.skip_torchao(str(tmp_path))
    assert ("torchao" in sys.modules) == is_skipped


def test_torchao_is_not_skipped_once_transformers_is_imported(monkeypatch):
    import transformers  # noqa: F401

    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torchao"})
    console.skip_torchao("mini")
    assert "torchao" not in sys.modules
