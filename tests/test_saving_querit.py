"""Saved folders: their files, and the runtimes that load them."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from modeling_querit import QueritForSequenceRanking, QueritProcessor
from modeling_querit.tokenization_querit import CHAT_TEMPLATE

FILES = {
    "README.md",
    "arguments_querit.py",
    "calibration_querit.py",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "configuration_querit.py",
    "documents_querit.py",
    "earlier_copies_querit.py",
    "loss_querit.py",
    "mixed_precision_querit.py",
    "model.safetensors",
    "modeling_querit.py",
    "modules.json",
    "moe_querit.py",
    "moe_triton_querit.py",
    "multi_process_querit.py",
    "offloading_querit.py",
    "prompt_learning_querit.py",
    "shallow_copies_querit.py",
    "tokenizer_backend_querit.py",
    "packed_attention_querit.py",
    "packed_forward_querit.py",
    "packing_querit.py",
    "pair_encoding_querit.py",
    "pipeline_querit.py",
    "processing_querit.py",
    "ranking_querit.py",
    "saving_querit.py",
    "scoring_querit.py",
    "sentence_bert_config.json",
    "tokenization_querit.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "validation_querit.py",
}


def files(folder):
    return {path.name for path in folder.iterdir()}


def is_import_attempt(node):
    return isinstance(node, ast.Try) and [ast.unparse(handler.type) for handler in node.handlers] == ["ImportError"]


# The files


def test_files(saved_folder):
    assert files(saved_folder) == FILES


def test_code_travels_flat(saved_folder):
    """The code files import torch, transformers, tokenizers and each other, and nothing else; triton where it is."""
    package = Path(importlib.util.find_spec("modeling_querit").origin).parent
    for path in saved_folder.glob("*.py"):
        text = path.read_text()
        assert text == (package / path.name).read_text()
        nodes = list(ast.walk(ast.parse(text)))
        optional = {child for node in nodes if is_import_attempt(node) for child in ast.walk(node)}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, f"{node.module}.py" in FILES) == (1, True), ast.unparse(node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                tops = {name.split(".")[0] for name in names}
                known = {"torch", "transformers", "tokenizers", "safetensors", *sys.stdlib_module_names}
                assert tops <= (known | {"triton"} if node in optional else known), ast.unparse(node)


def test_sentence_transformers_files(saved_folder):
    def read(name):
        return json.loads((saved_folder / name).read_text())

    [module] = read("modules.json")
    assert module["path"] == ""
    assert module["type"].endswith(".Transformer")
    assert read("sentence_bert_config.json")["modality_config"]["message"]["format"] == "flat"
    assert read("config_sentence_transformers.json")["model_type"] == "CrossEncoder"


def test_tokenizer_files(saved_folder):
    assert (saved_folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    config = json.loads((saved_folder / "tokenizer_config.json").read_text())
    assert config["cls_token"] == "[CLS]"
    assert config["padding_side"] == "left"
    assert config["model_max_length"] == tiny.MAX_LENGTH
    assert config["tokenizer_class"] == "QueritTokenizer"
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_querit.QueritTokenizer", None]}
    assert json.loads((saved_folder / "tokenizer.json").read_text())["truncation"] is None


def test_weights(saved_folder, model):
    tensors = tiny.read_tensors(saved_folder)
    expected = {
        ("score." + key.removeprefix("head.") if key.startswith("head.") else key): tensor
        for key, tensor in tiny.published_tensors(model).items()
    }
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key]), key


def test_card_stub_names_the_folder(saved_folder, architecture):
    card = (saved_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f'CrossEncoder("{architecture}", trust_remote_code=True)' in card
    assert "{name}" not in card


def test_an_existing_card_is_not_overwritten(model, tmp_path):
    (tmp_path / "README.md").write_text("My own words.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own words."
    assert files(tmp_path) == FILES


def test_saving_twice_is_saving_once(loaded, tmp_path):
    loaded.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_what_was_loaded_is_the_same_folder(loaded, saved_folder, tmp_path, architecture):
    first, second = tmp_path / "first" / architecture, tmp_path / "second" / architecture
    loaded.save_pretrained(first)
    QueritForSequenceRanking.from_pretrained(first).save_pretrained(second)
    for name in FILES:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    # The config of a model that was never loaded does not know its backbone's dtype yet.
    for name in FILES - {"config.json"}:
        assert (first / name).read_bytes() == (saved_folder / name).read_bytes(), name


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "folder", is_main_process=False)
    assert not (tmp_path / "folder" / "README.md").exists()
    assert not (tmp_path / "folder" / "tokenizer.json").exists()


def test_without_a_tokenizer_the_rest_is_written(architecture, tmp_path):
    tiny.make_model(architecture).save_pretrained(tmp_path)
    tokenizer_files = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert files(tmp_path) == FILES - tokenizer_files


def test_weights_are_saved_even_if_the_folder_they_came_from_is_gone(saved_folder, tmp_path):
    """At the end of a training, say, nothing may keep the weights from the disk."""
    shutil.copytree(saved_folder, tmp_path / "gone")
    model = QueritForSequenceRanking.from_pretrained(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    model.save_pretrained(tmp_path / "saved")
    saved = tiny.read_tensors(tmp_path / "saved")
    assert saved.keys() == tiny.read_tensors(saved_folder).keys()


def test_an_assigned_processor_is_saved(loaded, tmp_path):
    loaded.processor = QueritProcessor(tiny.make_tokenizer(), max_length=77)
    loaded.save_pretrained(tmp_path)
    assert QueritForSequenceRanking.from_pretrained(tmp_path).processor.max_length == 77


def test_the_processor_is_read_from_the_models_own_folder(saved_folder, loaded, processor):
    assert loaded.processor is loaded.processor
    assert loaded.processor.max_length == tiny.MAX_LENGTH
    assert loaded.processor.encode([tiny.QUERY], tiny.STRINGS[:1]) == processor.encode([tiny.QUERY], tiny.STRINGS[:1])
    assert QueritProcessor.from_pretrained(str(saved_folder)).max_length == tiny.MAX_LENGTH


def test_the_tokenizer_loads_by_itself(saved_folder, processor):
    tokenizer = AutoTokenizer.from_pretrained(saved_folder, trust_remote_code=True)
    chat = tokenizer.apply_chat_template(
        [{"role": "query", "content": tiny.QUERY}, {"role": "document", "content": tiny.STRINGS[0]}], return_dict=True
    )
    assert chat["input_ids"] == processor.encode([tiny.QUERY], tiny.STRINGS[:1])[0].input_ids


# The hub


@pytest.fixture
def uploads(monkeypatch):
    """Files that would have been uploaded, by path in the repository; nothing leaves the machine."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils import hub

    uploaded, repositories = {}, []

    def create_repo(*args, **kwargs):
        repositories.append(kwargs.get("repo_id") or args[-1])
        return SimpleNamespace(repo_id=repositories[-1])

    def create_commit(*args, operations, **kwargs):
        for operation in operations:
            uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def no_card(*args, **kwargs):
        raise LocalEntryNotFoundError("this repository has no card")

    for name, function in {"create_repo": create_repo, "create_commit": create_commit}.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, function)
        # Releases before 5.20 hold the functions themselves.
        monkeypatch.setattr(hub, name, function, raising=False)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    return SimpleNamespace(files=uploaded, repositories=repositories)


def test_push_to_hub_uploads_the_same_files(model, saved_folder, uploads):
    model.push_to_hub("somebody/reranker")
    assert uploads.repositories == ["somebody/reranker"]
    assert set(uploads.files) == FILES
    for name in FILES - {"README.md"}:
        assert uploads.files[name] == (saved_folder / name).read_bytes(), name


def test_push_to_hub_uploads_our_card(model, uploads):
    """Not transformers' blank template: the tags and the lines that load the model stand in ours."""
    model.push_to_hub("somebody/reranker")
    card = uploads.files["README.md"].decode()
    assert "pipeline_tag: text-ranking" in card
    assert 'CrossEncoder("somebody/reranker", trust_remote_code=True)' in card


def test_saving_and_pushing_at_once(model, saved_folder, uploads, tmp_path):
    model.save_pretrained(tmp_path / "reranker", push_to_hub=True, repo_id="somebody/reranker")
    assert set(uploads.files) == FILES
    for name in FILES - {"README.md"}:
        assert uploads.files[name] == (saved_folder / name).read_bytes(), name


# A fresh process without the package


@pytest.fixture(scope="session")
def fresh(architecture, saved_folders, tmp_path_factory, forked_python):
    """Results of every runtime from the folder, in a fresh process without the package."""
    pytest.importorskip("sentence_transformers")
    work = tmp_path_factory.mktemp("fresh")
    # A copy under another name, so that nothing depends on the place it was written to.
    shutil.copytree(saved_folders(architecture), work / "my-reranker-v1.0")
    inputs = {
        "folder": str(work / "my-reranker-v1.0"),
        "again": str(work / "again"),
        "result": str(work / "result.json"),
        "query": tiny.QUERY,
        "documents": tiny.STRINGS,
        "long": tiny.LONG_DOCUMENT,
        "instruction": tiny.INSTRUCTION,
        "mteb": importlib.util.find_spec("mteb") is not None,
    }
    (work / "inputs.json").write_text(json.dumps(inputs))
    script = Path(__file__).with_name("fresh_process.py")
    done = subprocess.run(
        [forked_python, str(script), str(work / "inputs.json")],
        cwd=work,
        env=os.environ | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=570,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(work=work, **json.loads((work / "result.json").read_text()))


@pytest.fixture
def expected(model):
    return pytest.approx(model.predict(tiny.pairs(tiny.STRINGS)).tolist(), abs=1e-5)


@pytest.mark.slow
def test_the_package_is_not_importable_there(fresh, architecture):
    assert fresh.import_error
    [name, training] = fresh.model
    assert name.startswith("transformers_modules.")
    assert name.endswith(".modeling_querit.QueritForSequenceRanking")
    assert not training
    assert fresh.backbone == tiny.BACKBONES[architecture].__name__


@pytest.mark.slow
def test_auto_model(fresh, model, expected):
    assert fresh.predict == expected
    assert fresh.forward == expected
    assert fresh.rank == [ranked.index for ranked in model.rank(tiny.QUERY, tiny.STRINGS, top_k=3)]


@pytest.mark.slow
def test_auto_model_for_sequence_classification(fresh, expected):
    assert fresh.classifier == "QueritForSequenceClassification"
    assert [len(row) for row in fresh.logits] == [1] * len(tiny.STRINGS)
    assert torch.tensor(fresh.logits).tanh().squeeze(-1).tolist() == expected


@pytest.mark.slow
def test_cross_encoder(fresh, model, expected):
    assert fresh.encoder_activation == "Tanh"
    assert fresh.encoder == expected
    assert fresh.encoder_one == pytest.approx(model.predict(tiny.pairs(tiny.STRINGS[:1])).item(), abs=1e-5)
    ranking = model.rank(tiny.QUERY, tiny.STRINGS)
    assert [index for index, _ in fresh.encoder_rank] == [ranked.index for ranked in ranking]
    assert [score for _, score in fresh.encoder_rank] == pytest.approx([ranked.score for ranked in ranking], abs=1e-5)


@pytest.mark.slow
def test_cross_encoder_takes_an_instruction_as_its_prompt(fresh, model, expected):
    with_instruction = model.predict(tiny.pairs(tiny.STRINGS), instruction=tiny.INSTRUCTION).tolist()
    assert with_instruction != expected
    assert fresh.encoder_instruction == pytest.approx(with_instruction, abs=1e-5)
    assert fresh.predict_instruction == pytest.approx(with_instruction, abs=1e-5)


@pytest.mark.slow
def test_cross_encoder_cuts_long_documents_as_we_do(fresh, model):
    scores = model.predict([(tiny.QUERY, tiny.LONG_DOCUMENT), *tiny.pairs(tiny.STRINGS[:1])]).tolist()
    assert fresh.predict_long == pytest.approx(scores, abs=1e-5)
    assert fresh.encoder_long == pytest.approx(scores, abs=1e-5)


@pytest.mark.slow
def test_chat_template_there(fresh, processor):
    assert fresh.chat == processor.encode([tiny.QUERY], tiny.STRINGS[:1])[0].input_ids


@pytest.mark.slow
def test_mteb_wrapper(fresh, model):
    pytest.importorskip("mteb")
    scores = model.predict(tiny.pairs(tiny.STRINGS)).tolist()
    assert fresh.mteb == pytest.approx(scores, abs=1e-4)
    with_instruction = model.predict(tiny.pairs(tiny.STRINGS), instruction=tiny.INSTRUCTION).tolist()
    assert fresh.mteb_instruction == pytest.approx(with_instruction, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ranker", "classifier", "encoder"])
def test_what_remote_code_saves_loads_again(fresh, expected, name):
    assert getattr(fresh, f"again_{name}") == expected
    folder = fresh.work / "again" / name
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"}
    assert not any("--" in value for value in auto_map.values())
    # With the package, too, and every tensor is the same.
    again = QueritForSequenceRanking.from_pretrained(folder)
    assert again.predict(tiny.pairs(tiny.STRINGS)).tolist() == expected
    original = tiny.read_tensors(fresh.work / "my-reranker-v1.0")
    tensors = tiny.read_tensors(folder)
    assert tensors.keys() == original.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, original[key]), key


@pytest.mark.slow
def test_what_remote_code_saves_is_a_whole_folder(fresh, expected):
    assert files(fresh.work / "again" / "ranker") == FILES
    assert files(fresh.work / "again" / "classifier") == FILES
    assert fresh.again_cross_encoder == expected
