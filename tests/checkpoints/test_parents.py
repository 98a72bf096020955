"""Rerankers as tensors by name, whatever they are stored as."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from tiny_parents import adapt, bits, change, make_adapter, vary, whole
from transformers import AutoModel

from modeling_querit import QueritProcessor, from_backbone
from modeling_querit.checkpoints.parents import check_alike, check_trained, open_parent
from modeling_querit.checkpoints.streaming import HeldTensor
from modeling_querit.files import write_jsonl

LAYOUTS = tiny.LAYOUTS | {"with frequencies": {"frequencies": True}}


@pytest.fixture
def open_(tmp_path):
    (tmp_path / "aside").mkdir()
    return lambda name: open_parent(str(name), tmp_path / "aside")


@pytest.fixture
def decoder(tokenizer, tmp_path):
    """A plain decoder, as transformers saves it."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny.make_text_config("qwen3")).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def assert_holds(parent, expected, tolerance=0.0):
    assert parent.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        found = whole(parent.tensors[key])
        assert parent.tensors[key].shape == found.shape == tensor.shape, key
        if tolerance:
            torch.testing.assert_close(found, tensor, rtol=tolerance, atol=tolerance)
        else:
            assert bits(found) == bits(tensor), key


def name_base(adapter, name):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(name)}))


# What can be opened


def test_our_layout(saved_folder, open_):
    parent = open_(saved_folder)
    assert parent.name == str(saved_folder)
    assert_holds(parent, tiny.read_tensors(saved_folder))
    assert {path.name for path in parent.files} == {"config.json", "model.safetensors"}
    assert parent.model.processor.cls_token_id is not None
    assert {parameter.device.type for parameter in parent.model.parameters()} == {"meta"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(model, saved_folder, tmp_path, open_, layout):
    options = dict(LAYOUTS[layout])
    tensors = tiny.published_tensors(model, options.pop("prefix", "model."))
    if options.pop("lm_head", False):
        tensors["lm_head.weight"] = torch.randn(512, 32)
    if options.pop("frequencies", False):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    parent = open_(tiny.write_published(tmp_path / "published", model, tensors, **options))
    assert_holds(parent, tiny.read_tensors(saved_folder))
    check_alike([parent, open_(saved_folder)])
    shards = {path for path in parent.files if path.suffix == ".safetensors"}
    assert len(shards) == options.get("shards", 1)


def test_the_dtype_of_the_checkpoint(models, saved_folders, tmp_path, open_):
    folder = vary(saved_folders("deepseek_v3"), tmp_path / "half", seed=1, dtype=torch.bfloat16)
    parent = open_(folder)
    assert_holds(parent, tiny.read_tensors(folder))
    found = {key: tensor.dtype for key, tensor in parent.tensors.items()}
    assert found.pop("model.layers.1.mlp.gate.e_score_correction_bias") is torch.float32
    assert set(found.values()) == {torch.bfloat16}


def test_an_adapter_on_a_reranker(saved_folder, tmp_path, open_):
    adapt(tmp_path / "adapter", saved_folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    parent = open_(tmp_path / "adapter")
    assert parent.name == str(tmp_path / "adapter")
    assert_holds(parent, tiny.read_tensors(tmp_path / "merged"), tolerance=2e-6)
    assert {path.name for path in parent.files} == {
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    check_alike([parent, open_(saved_folder), open_(tmp_path / "merged")])


def test_an_adapter_on_a_published_reranker(model, tmp_path, open_):
    base = tiny.write_published(tmp_path / "published", model, tiny.published_tensors(model))
    adapt(tmp_path / "adapter", base).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_holds(open_(tmp_path / "adapter"), tiny.read_tensors(tmp_path / "merged"), tolerance=2e-6)


def test_an_adapter_on_an_adapter(saved_folders, tmp_path, open_):
    first = adapt(tmp_path / "first", saved_folders("qwen3"), seed=1).merge_and_unload()
    make_adapter(tmp_path / "second", first, seed=2).merge_and_unload().save_pretrained(tmp_path / "merged")
    name_base(tmp_path / "second", tmp_path / "first")
    assert_holds(open_(tmp_path / "second"), tiny.read_tensors(tmp_path / "merged"), tolerance=5e-6)


def test_files_of_adapters_on_adapters_have_names_of_their_own(saved_folders, tmp_path, open_):
    adapt(tmp_path / "first", saved_folders("qwen3"))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    name_base(tmp_path / "second", tmp_path / "first")
    names = {
        f"{folder}/adapter_{file}" for folder in ("first", "second") for file in ("config.json", "model.safetensors")
    }
    assert open_(tmp_path / "second").named_files().keys() == names | {"config.json", "model.safetensors"}


def test_an_adapter_that_names_itself_as_its_base(saved_folders, tmp_path, open_):
    adapt(tmp_path / "both", saved_folders("qwen3"))
    name_base(tmp_path / "both", tmp_path / "both")
    with pytest.raises(ValueError, match="is both an adapter and its base"):
        open_(tmp_path / "both")


def test_a_plain_decoder_keeps_its_dtype(decoder, tmp_path, open_):
    AutoModel.from_pretrained(decoder, dtype=torch.bfloat16).save_pretrained(decoder)
    make_adapter(tmp_path / "adapter", from_backbone(decoder))
    name_base(tmp_path / "adapter", decoder)
    assert {tensor.dtype for tensor in open_(tmp_path / "adapter").tensors.values()} == {torch.bfloat16}


def test_the_commit_of_a_repository(saved_folder, tmp_path, open_):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--someone--name" / "snapshots" / commit
    shutil.copytree(saved_folder, snapshot)
    assert open_(snapshot).revision == commit
    assert open_(saved_folder).revision is None


def test_adapters_on_a_plain_decoder(decoder, tmp_path, open_):
    for seed in (1, 2):
        adapted = make_adapter(tmp_path / f"adapter-{seed}", from_backbone(decoder), seed=seed)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"merged-{seed}")
        name_base(tmp_path / f"adapter-{seed}", decoder)
    for seed in (1, 2):
        parent = open_(tmp_path / f"adapter-{seed}")
        assert_holds(parent, tiny.read_tensors(tmp_path / f"merged-{seed}"), tolerance=2e-6)
        check_trained(parent)
        check_alike([parent, open_(tmp_path / f"merged-{seed}")])
    assert sorted(path.name for path in decoder.iterdir()) == sorted(
        {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    )


@pytest.mark.parametrize("base", ["reranker", "decoder"])
def test_the_adapter_of_a_training_run_is_the_model_beside_it(saved_folders, decoder, tmp_path, open_, base):
    from modeling_querit.training.run import main

    rows = [{"query": f"q {n}", "documents": [f"this is {n}", "nothing"], "labels": [1, 0]} for n in range(4)]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    name = str(decoder if base == "decoder" else saved_folders("qwen3"))
    settings = ["--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run"), "--lora_rank", "2"]
    settings += ["--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no", "--report_to", "none"]
    main(["--model", name, *settings, "--use_cpu", "True", "--disable_tqdm", "True"])
    adapter, model = open_(tmp_path / "run" / "adapter"), open_(tmp_path / "run" / "model")
    assert_holds(adapter, {key: whole(tensor) for key, tensor in model.tensors.items()}, tolerance=1e-6)
    check_alike([adapter, model])
    check_trained(adapter)
    with pytest.raises(FileNotFoundError, match=r"run holds no config\.json.*: name .*run/model"):
        open_(tmp_path / "run")


# What cannot


def test_a_folder_with_nothing_in_it(tmp_path, open_):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no config\.json and no adapter_config\.json\.$"):
        open_(tmp_path / "empty")


@pytest.mark.parametrize(("inside", "named"), [(["model", "adapter"], "model"), (["adapter"], "adapter")])
def test_the_output_of_a_training_run_names_what_is_inside(tmp_path, open_, inside, named):
    for name in inside:
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf": name .*/run/{named}\.$"):
        open_(tmp_path / "run")


@pytest.mark.parametrize("name", ["./nowhere", "no/such/folder", "nobody/nothing", "/nowhere/at/all"])
def test_a_model_that_is_nowhere(open_, name):
    with pytest.raises(OSError, match="is no folder, and no repository that could be reached") as error:
        open_(name)
    assert name in str(error.value)


def test_a_base_that_is_nowhere(saved_folders, tmp_path, open_):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    name_base(tmp_path / "adapter", tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):
        open_(tmp_path / "adapter")


def test_a_damaged_checkpoint(saved_folder, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"damaged/model\.safetensors is damaged or cut short"):
        open_(tmp_path / "damaged")


@pytest.mark.parametrize("key", ["score.bias", "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_missing_weight_is_named(saved_folder, tmp_path, open_, key):
    folder = change(saved_folder, tmp_path / "lacking", lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        open_(folder)


def test_a_missing_expert_is_named(saved_folders, tmp_path, open_):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    source = saved_folders("deepseek_v3")
    folder = change(source, tmp_path / "lacking", lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        open_(folder)


def test_a_weight_of_another_shape_is_named(saved_folder, tmp_path, open_):
    folder = change(saved_folder, tmp_path / "three", lambda tensors: tensors | {"score.weight": torch.ones(3, 32)})
    with pytest.raises(ValueError, match=r"score\.weight has shape \(3, 32\)"):
        open_(folder)


def test_a_checkpoint_without_safetensors(saved_folder, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled holds no safetensors files"):
        open_(tmp_path / "pickled")


def test_a_checkpoint_without_a_tokenizer(saved_folder, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises((ValueError, OSError), match="mute"):
        open_(tmp_path / "mute")


def test_a_damaged_config(saved_folder, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match="damaged"):
        open_(tmp_path / "damaged")


# Parents that do not go together


@pytest.fixture
def parent(saved_folder, open_):
    return open_(saved_folder)


def test_parents_may_differ_in_numbers_and_dtype(saved_folder, parent, tmp_path, open_):
    other = open_(vary(saved_folder, tmp_path / "other", seed=1, dtype=torch.bfloat16))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["text_config"] |= {"use_cache": False, "transformers_version": "4.0.0", "attention_dropout": 0.1}
    config["text_config"] |= {"initializer_range": 0.5, "pad_token_id": 3, "output_hidden_states": True}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    check_alike([parent, other, open_(tmp_path / "other")])


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.5), ("max_position_embeddings", 128)])
def test_another_config_names_the_key(saved_folder, parent, tmp_path, open_, key, value):
    shutil.copytree(saved_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    before, config["text_config"][key] = config["text_config"][key], value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"other has {key} {value!r}, .* {before!r}: only models of one architecture"):
        check_alike([parent, open_(tmp_path / "other")])


def test_a_config_that_is_a_list(saved_folder, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is no object of names and values"):
        open_(tmp_path / "other")


def test_a_head_under_both_names(saved_folder, tmp_path, open_):
    two = change(saved_folder, tmp_path / "two", lambda tensors: tensors | {"head.weight": torch.ones(2, 32)})
    with pytest.raises(ValueError, match=r"has score\.weight twice, under the names of two layouts"):
        open_(two)


def test_another_architecture(saved_folders, open_):
    with pytest.raises(ValueError, match="only models of one architecture can be merged") as error:
        check_alike([open_(saved_folders(each)) for each in tiny.ARCHITECTURES])
    assert all(str(saved_folders(each)) in str(error.value) for each in tiny.ARCHITECTURES)


def test_another_vocabulary_names_a_token(saved_folder, parent, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["Ġcontent"], vocab["Ġthe"] = vocab["Ġthe"], vocab["Ġcontent"]
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"other has another vocabulary than .*'Ġcontent' is \d+, not \d+, and 1 more"):
        check_alike([parent, open_(tmp_path / "other")])


def test_a_token_more_is_another_vocabulary(saved_folder, parent, tmp_path, open_):
    shutil.copytree(saved_folder, tmp_path / "other")
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    QueritProcessor(tokenizer).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"'\[NEW\]' is \d+, not None, and 0 more differ"):
        check_alike([parent, open_(tmp_path / "other")])


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_tokenizer_that_splits_otherwise_is_named(saved_folder, parent, tmp_path, open_, part):
    shutil.copytree(saved_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    other = {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: other[part]}))
    with pytest.raises(ValueError, match=f"another {part} in its tokenizer"):
        check_alike([parent, open_(tmp_path / "other")])


def test_a_missing_tensor_is_named(parent):
    tensors = {key: tensor for key, tensor in parent.tensors.items() if "layers.1" not in key}
    other = dataclasses.replace(parent, name="other", tensors=tensors)
    for pair in ([parent, other], [other, parent]):
        with pytest.raises(ValueError, match=r"other lacks model\.layers\.1\.\S+ \(and \d+ more\), which "):
            check_alike(pair)


def test_a_tensor_of_another_shape_is_named(parent):
    tensors = parent.tensors | {"score.bias": HeldTensor(torch.ones(3))}
    other = dataclasses.replace(parent, name="other", tensors=tensors)
    with pytest.raises(ValueError, match=r"score\.bias has shape \(3,\) in other, but \(2,\) in "):
        check_alike([parent, other])


def test_the_third_is_looked_at_too(parent):
    tensors = parent.tensors | {"score.bias": HeldTensor(torch.ones(3))}
    with pytest.raises(ValueError, match=r"score\.bias has shape \(3,\) in third"):
        check_alike([parent, parent, dataclasses.replace(parent, name="third", tensors=tensors)])


@pytest.mark.parametrize("head", [torch.zeros(2, 32), torch.ones(2, 32), torch.arange(32.0).expand(2, 32)])
def test_a_head_that_was_never_trained(saved_folder, tmp_path, open_, head):
    folder = change(saved_folder, tmp_path / "new", lambda tensors: tensors | {"score.weight": head.contiguous()})
    parent = open_(folder)
    with pytest.raises(ValueError, match=r"The head of .*new was never trained: the rows of score\.weight are equal"):
        check_trained(parent)


def test_a_trained_head(parent):
    check_trained(parent)
    assert parent.tensors["score.weight"].shape == (2, 32)
