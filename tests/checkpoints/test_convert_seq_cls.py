"""Conversion to a sequence classifier, and scores of runtimes without this package's code."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GraniteConfig,
    Qwen3ForSequenceClassification,
)

from modeling_querit import QueritConfig, QueritForSequenceRanking, QueritProcessor
from modeling_querit.checkpoints import checkpoint
from modeling_querit.checkpoints.convert import convert_to_seq_cls
from modeling_querit.checkpoints.loading import load_for_training

NAMES = [*tiny.ARCHITECTURES, "gemma3_text"]
CLASSES = {
    "qwen3": "Qwen3ForSequenceClassification",
    "deepseek_v3": "DeepseekV3ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
}
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    # For pairs, with trust_remote_code.
    "arguments_querit.py",
    "pair_encoding_querit.py",
    "tokenization_querit.py",
    "tokenizer_backend_querit.py",
}


def bias_of(model):
    """The bias of the one logit, which transformers has no place for: (b1 - b0) / 2."""
    b0, b1 = model.score.bias.detach().double().tolist()
    return (b1 - b0) / 2


def one_logit(tensors):
    """Published tensors as those of the classifier, the head by numpy."""
    weight, bias = (tensors[key].double().numpy() for key in ("head.weight", "head.bias"))
    folded = {"score.weight": (weight[1:] - weight[:1]) / 2, "score.bias": (bias[1:] - bias[:1]) / 2}
    expected = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    return expected | {key: torch.from_numpy(value).float() for key, value in folded.items()}


def assert_equal_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


def write_bfloat16(model, folder):
    """Save a model in bfloat16; the routing bias stays in float32, as in transformers."""
    copied = copy.deepcopy(model)
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        if not name.endswith("e_score_correction_bias") and "inv_freq" not in name:
            tensor.data = tensor.data.bfloat16()
    copied.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(models, processor, saved_folders, tmp_path_factory):
    """Models and their folders, by name."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    gemma = tiny.make_model("gemma3_text", processor, sliding_window=8, **layers)
    folder = tmp_path_factory.mktemp("sources") / "gemma3_text"
    gemma.save_pretrained(folder)
    return {name: (models(name), saved_folders(name)) for name in tiny.ARCHITECTURES} | {"gemma3_text": (gemma, folder)}


@pytest.fixture(scope="module")
def exports(sources, tmp_path_factory):
    """Folders by name and dtype."""
    work = tmp_path_factory.mktemp("exports")
    return {
        f"{name}-{dtype}": convert_to_seq_cls(sources[name][1], work / f"{name}-{dtype}", dtype)
        for name in NAMES
        for dtype in ("auto", "bfloat16")
    }


@pytest.fixture(scope="module")
def fresh(exports, tmp_path_factory, forked_python):
    """Results of transformers and sentence-transformers in a fresh process without the package."""
    pytest.importorskip("sentence_transformers")
    work = tmp_path_factory.mktemp("fresh")
    folders = {name: shutil.copytree(folder, work / "folders" / name) for name, folder in exports.items()}
    request = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "result": str(work / "result.json"),
        "query": tiny.QUERY,
        "documents": tiny.STRINGS,
        "long": tiny.LONG_DOCUMENT,
        "instruction": tiny.INSTRUCTION,
        "conversations": [conversation(document) for document in tiny.DOCUMENTS],
    }
    (work / "request.json").write_text(json.dumps(request))
    process = subprocess.run(
        [forked_python, str(Path(__file__).parents[1] / "fresh_classifiers.py"), str(work / "request.json")],
        cwd=work,
        env=os.environ | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((work / "result.json").read_text())


def conversation(document):
    parts = document if isinstance(document, dict) else {"text": document}
    messages = [{"role": "query", "content": tiny.QUERY}, {"role": "document", "content": parts["text"]}]
    return [*messages, {"role": "title", "content": parts["title"]}] if "title" in parts else messages


def with_bias(scores, model):
    """Add the bias to the scores of a runtime that leaves it out."""
    return np.tanh(np.arctanh(scores) + bias_of(model)).tolist()


# In a fresh process without the package


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_transformers_loads_it(fresh, name):
    actual = fresh[f"{name}-auto"]
    assert actual["class"] == ["transformers", CLASSES[name]]
    assert (actual["labels"], actual["dtype"]) == (1, "torch.float32")
    assert (actual["missing"], actual["unexpected"]) == ([], ["score.bias"])
    assert fresh["remote_code"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", ["logits", "alone", "right"])
def test_the_tanh_of_logit_and_bias_is_the_score(fresh, sources, name, batch):
    model, _ = sources[name]
    expected = model.predict(tiny.pairs()).tolist()
    logits = np.array(fresh[f"{name}-auto"][batch])
    assert np.tanh(logits + bias_of(model)).tolist() == pytest.approx(expected, abs=1e-5)
    assert np.argsort(logits).tolist() == np.argsort(expected).tolist()
    # The bias is not zero.
    assert abs(bias_of(model)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", ["encoder", "encoder_twos"])
def test_cross_encoder_gives_the_same_scores(fresh, sources, name, batch):
    model, _ = sources[name]
    assert fresh[f"{name}-auto"]["activation"] == "Tanh"
    scores = fresh[f"{name}-auto"][batch]
    assert with_bias(scores, model) == pytest.approx(model.predict(tiny.pairs(tiny.STRINGS)).tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_cross_encoder_gives_the_same_order(fresh, sources, name):
    ranking = sources[name][0].rank(tiny.QUERY, tiny.STRINGS)
    assert fresh[f"{name}-auto"]["encoder_rank"] == [ranked.index for ranked in ranking]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_cross_encoder_takes_an_instruction_as_its_prompt(fresh, sources, name):
    model, _ = sources[name]
    expected = model.predict(tiny.pairs(tiny.STRINGS), instruction=tiny.INSTRUCTION).tolist()
    assert with_bias(fresh[f"{name}-auto"]["encoder_instruction"], model) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_cross_encoder_truncates_long_documents_alike(fresh, sources, name):
    model, _ = sources[name]
    expected = model.predict([(tiny.QUERY, tiny.LONG_DOCUMENT), *tiny.pairs(tiny.STRINGS[:1])]).tolist()
    assert with_bias(fresh[f"{name}-auto"]["encoder_long"], model) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_in_bfloat16_gives_close_scores(fresh, sources, tmp_path, name):
    """In bfloat16 the logit, too, has only eight significant bits."""
    actual = fresh[f"{name}-bfloat16"]
    assert actual["dtype"] == "torch.bfloat16"
    assert actual["missing"] == []
    model, _ = sources[name]
    rounded = QueritForSequenceRanking.from_pretrained(write_bfloat16(model, tmp_path / "rounded"))
    expected = rounded.predict(tiny.pairs()).tolist()
    assert np.tanh(np.array(actual["logits"]) + bias_of(model)).tolist() == pytest.approx(expected, abs=0.1)


# The folder


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_has_no_code_of_a_model(exports, name):
    assert {path.name for path in exports[f"{name}-auto"].iterdir()} == FILES


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_that_of_the_classifier(exports, sources, name):
    config = json.loads((exports[f"{name}-auto"] / "config.json").read_text())
    # vLLM derives its classifier from the causal LM: Gemma3ForCausalLM has no Text in its name.
    assert config["architectures"] == [CLASSES[name].replace("3Text", "3")]
    assert (config["model_type"], config["dtype"]) == (name, "float32")
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["label2id"] == {"LABEL_0": 0}
    # torch.export cannot return the cache.
    assert config["use_cache"] is False
    assert "auto_map" not in config
    text_config = sources[name][0].config.text_config
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "max_position_embeddings"):
        assert config[key] == getattr(text_config, key), key


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_has_no_local_paths(exports, sources, name):
    _, source = sources[name]
    for path in exports[f"{name}-auto"].iterdir():
        content = path.read_bytes()
        for folder in (source.parent, exports[f"{name}-auto"].parent):
            assert str(folder).encode() not in content, path.name


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_folded_and_the_backbone_unchanged(exports, sources, name):
    """The backbone is unchanged, with one key for every expert; the head is folded to one logit."""
    actual = tiny.read_tensors(exports[f"{name}-auto"])
    assert_equal_tensors(actual, one_logit(tiny.published_tensors(sources[name][0])))
    assert actual["score.weight"].shape == (1, 32)
    assert actual["score.bias"].shape == (1,)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_stays_in_float32(exports, sources, name):
    expected = one_logit(tiny.published_tensors(sources[name][0]))
    routing = [key for key in expected if key.endswith("e_score_correction_bias")]
    assert bool(routing) == (name == "deepseek_v3")
    float32_keys = [*routing, "score.weight", "score.bias"]
    rounded = {key: tensor if key in float32_keys else tensor.bfloat16() for key, tensor in expected.items()}
    assert_equal_tensors(tiny.read_tensors(exports[f"{name}-bfloat16"]), rounded)
    assert json.loads((exports[f"{name}-bfloat16"] / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_states_the_bias(exports, sources):
    card = (exports["qwen3-auto"] / "README.md").read_text()
    [bias] = re.findall(r"The logit has a bias, (\S+)\. ", card)
    assert float(bias) == pytest.approx(bias_of(sources["qwen3"][0]), rel=1e-5)
    assert "`Qwen3ForSequenceClassification`" in card
    assert 'CrossEncoder("qwen3-auto")' in card


# Sources


def assert_same_folder(folder, expected):
    assert {path.name for path in folder.iterdir()} == FILES
    assert_equal_tensors(tiny.read_tensors(folder), tiny.read_tensors(expected))
    for name in FILES - {"README.md", "model.safetensors"}:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.slow
def test_shards_are_converted(model, exports, architecture, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    folder = convert_to_seq_cls(tmp_path / "shards", tmp_path / "export")
    assert_same_folder(folder, exports[f"{architecture}-auto"])


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_the_published_layout_is_converted(model, exports, architecture, tmp_path, prefix):
    tensors = tiny.published_tensors(model, prefix) | {"lm_head.weight": torch.randn(512, 32)}
    source = tiny.write_published(tmp_path / "published", model, tensors, shards=2)
    folder = convert_to_seq_cls(str(source), tmp_path / "export")
    assert_equal_tensors(tiny.read_tensors(folder), tiny.read_tensors(exports[f"{architecture}-auto"]))
    exported = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(exported).__name__ == CLASSES[architecture]
    assert scores_in(exported, folder) == pytest.approx(model.predict(tiny.pairs()).tolist(), abs=1e-5)


def scores_in(classifier, folder):
    """Score one padded batch, with the bias from the file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(
        [conversation(document) for document in tiny.DOCUMENTS], padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = classifier(**batch).logits.squeeze(-1)
    return (logits + tiny.read_tensors(folder)["score.bias"]).tanh().tolist()


SAVED_HEAD = {"target_modules": ["o_proj", "down_proj"], "modules_to_save": ["score"]}
ADAPTED_HEAD = {"target_modules": ["o_proj", "down_proj", "score"]}


def train_adapter(folder, destination, dtype=torch.float32, modules=SAVED_HEAD):
    """Save an adapter with random weights; return the model that peft merges it into."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, **modules)
    adapted = get_peft_model(load_for_training(folder, dtype), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3 if "lora_" in name else 0.1)
    adapted.save_pretrained(destination)
    return adapted.merge_and_unload()


HEADS = pytest.mark.parametrize("modules", [SAVED_HEAD, ADAPTED_HEAD], ids=["own", "update"])


@pytest.mark.slow
@HEADS
def test_an_adapter_is_converted(saved_folder, model, tmp_path, modules):
    merged = train_adapter(saved_folder, tmp_path / "adapter", modules=modules)
    folder = convert_to_seq_cls(tmp_path / "adapter", tmp_path / "export")
    actual, expected = tiny.read_tensors(folder), one_logit(tiny.published_tensors(merged))
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6, msg=key)
    merged.processor = model.processor
    scores = merged.predict(tiny.pairs()).tolist()
    assert scores != pytest.approx(model.predict(tiny.pairs()).tolist(), abs=1e-2)
    exported = AutoModelForSequenceClassification.from_pretrained(folder)
    assert scores_in(exported, folder) == pytest.approx(scores, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["querit", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@HEADS
def test_an_adapter_keeps_the_data_type_of_its_base(models, tmp_path, layout, dtype, modules):
    """Whatever the adapter was trained in, "auto" is the dtype of the checkpoint."""
    base = write_bfloat16(models("qwen3"), tmp_path / "base")
    if layout == "published":
        tensors = {key.replace("score.", "head."): tensor for key, tensor in tiny.read_tensors(base).items()}
        base = tiny.write_published(tmp_path / "published", models("qwen3"), tensors)
    train_adapter(base, tmp_path / "adapter", dtype, modules)
    folder = convert_to_seq_cls(tmp_path / "adapter", tmp_path / "export")
    dtypes = {key: tensor.dtype for key, tensor in tiny.read_tensors(folder).items()}
    assert {key for key, dtype in dtypes.items() if dtype != torch.bfloat16} == {"score.weight", "score.bias"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_auto_keeps_bfloat16(model, tmp_path):
    source = write_bfloat16(model, tmp_path / "source")
    folder = convert_to_seq_cls(source, tmp_path / "export")
    tensors = tiny.read_tensors(source)
    tensors = {key.replace("score.", "head."): tensor for key, tensor in tensors.items()}
    assert_equal_tensors(tiny.read_tensors(folder), one_logit(tensors))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("missing_tokens", [["pad_token"], ["pad_token", "eos_token"]])
def test_a_tokenizer_without_padding_token_gets_one(model, tmp_path, missing_tokens):
    """transformers finds the last token by the padding token, so there must be one, and not `[CLS]`."""
    model = copy.deepcopy(model)
    model.config.text_config.pad_token_id = None
    model.processor = QueritProcessor(tiny.make_tokenizer(**dict.fromkeys(missing_tokens)))
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    folder = convert_to_seq_cls(source, tmp_path / "export")
    exported = AutoModelForSequenceClassification.from_pretrained(folder)
    assert scores_in(exported, folder) == pytest.approx(model.predict(tiny.pairs()).tolist(), abs=1e-5)


# What is no source, and no destination


def other_decoder(config, processor):
    model = QueritForSequenceRanking(QueritConfig(text_config=config))
    model.processor = processor
    return model


@pytest.mark.parametrize(
    "config",
    [
        # One without a classifier in transformers, and one whose classifier has other keys.
        GraniteConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
        GPTNeoXConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_an_architecture_without_a_classifier_is_refused(processor, tmp_path, config):
    model = other_decoder(config, processor)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"no last-token classifier for {config.model_type}"):
        convert_to_seq_cls(tmp_path / "source", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_with_content_is_not_overwritten(saved_folder, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="export exists"):
        convert_to_seq_cls(saved_folder, tmp_path / "export")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(saved_folder, tmp_path):
    (tmp_path / "export").mkdir()
    convert_to_seq_cls(saved_folder, tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == FILES


@pytest.mark.parametrize("missing_key", ["head.bias", "model.norm.weight"])
def test_an_incomplete_checkpoint_is_not_converted(model, tmp_path, missing_key):
    tensors = tiny.published_tensors(model)
    del tensors[missing_key]
    source = tiny.write_published(tmp_path / "source", model, tensors)
    with pytest.raises(ValueError, match=missing_key.replace("head", "score").replace(".", r"\.")):
        convert_to_seq_cls(source, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_without_a_tokenizer_is_not_converted(saved_folder, tmp_path):
    source = Path(shutil.copytree(saved_folder, tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    with pytest.raises((OSError, ValueError)):
        convert_to_seq_cls(source, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(OSError, match=r"There is no folder .*nowhere"):
        convert_to_seq_cls(tmp_path / "nowhere", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_data_type_is_refused(saved_folder, tmp_path):
    with pytest.raises(ValueError, match="'int8': choose auto, float32"):
        convert_to_seq_cls(saved_folder, tmp_path / "export", dtype="int8")
    assert list(tmp_path.iterdir()) == []


# The command


def test_the_command_converts_the_mini(querit, monkeypatch, saved_folders, exports, tmp_path):
    monkeypatch.setattr(checkpoint, "default_model_path", lambda: saved_folders("qwen3"))
    code, out, _ = querit("convert", "mini", tmp_path / "export", "--to", "seq-cls")
    assert (code, out) == (0, f"Wrote {tmp_path / 'export'}\n")
    assert_same_folder(tmp_path / "export", exports["qwen3-auto"])
    assert "`mini`, a Querit reranker" in (tmp_path / "export" / "README.md").read_text()
    assert isinstance(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "export"), Qwen3ForSequenceClassification
    )


@pytest.mark.slow
def test_the_command_with_options(querit, saved_folder, tmp_path):
    code, _, _ = querit("convert", saved_folder, tmp_path / "export", "--to", "seq-cls", "--dtype", "float16")
    assert code == 0
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--to", "gguf"], "'gguf' is not"), (["--dtype", "int4"], "dtype is 'int4'")],
)
def test_the_command_refuses_wrong_options(querit, saved_folders, tmp_path, options, message):
    code, out, err = querit("convert", saved_folders("qwen3"), tmp_path / "export", "--to", "seq-cls", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []
