"""Checkpoints in all layouts, and errors about those that cannot be opened."""

import json
import shutil

import pytest
import tiny
import torch
from tiny_checkpoints import adapt, bits, change, make_adapter, vary, whole
from transformers import AutoModel

from modeling_querit import from_backbone
from modeling_querit.checkpoints.checkpoint import check_trained, open_checkpoint
from modeling_querit.files import write_jsonl
from modeling_querit.merging.compatibility import check_compatible

LAYOUTS = tiny.LAYOUTS | {"with frequencies": {"frequencies": True}}


@pytest.fixture
def open_by_name(tmp_path):
    (tmp_path / "temporary").mkdir()
    return lambda name: open_checkpoint(str(name), tmp_path / "temporary")


@pytest.fixture
def decoder(tokenizer, tmp_path):
    """A plain decoder, as transformers saves it."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny.make_text_config("qwen3")).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def assert_holds(checkpoint, expected, tolerance=0.0):
    assert checkpoint.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        actual = whole(checkpoint.tensors[key])
        assert checkpoint.tensors[key].shape == actual.shape == tensor.shape, key
        if tolerance:
            torch.testing.assert_close(actual, tensor, rtol=tolerance, atol=tolerance)
        else:
            assert bits(actual) == bits(tensor), key


def name_base(adapter, name):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(name)}))


# Checkpoints that can be opened


def test_a_saved_folder_is_opened(saved_folder, open_by_name):
    checkpoint = open_by_name(saved_folder)
    assert checkpoint.name == str(saved_folder)
    assert_holds(checkpoint, tiny.read_tensors(saved_folder))
    assert {path.name for path in checkpoint.files} == {"config.json", "model.safetensors"}
    assert checkpoint.model.processor.cls_token_id is not None
    assert {parameter.device.type for parameter in checkpoint.model.parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_opened(model, saved_folder, tmp_path, open_by_name, layout):
    options = dict(LAYOUTS[layout])
    tensors = tiny.published_tensors(model, options.pop("prefix", "model."))
    if options.pop("lm_head", False):
        tensors["lm_head.weight"] = torch.randn(512, 32)
    if options.pop("frequencies", False):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    checkpoint = open_by_name(tiny.write_published(tmp_path / "published", model, tensors, **options))
    assert_holds(checkpoint, tiny.read_tensors(saved_folder))
    check_compatible([checkpoint, open_by_name(saved_folder)])
    shards = {path for path in checkpoint.files if path.suffix == ".safetensors"}
    assert len(shards) == options.get("shards", 1)


def test_tensors_keep_their_data_types(models, saved_folders, tmp_path, open_by_name):
    folder = vary(saved_folders("deepseek_v3"), tmp_path / "half", seed=1, dtype=torch.bfloat16)
    checkpoint = open_by_name(folder)
    assert_holds(checkpoint, tiny.read_tensors(folder))
    actual = {key: tensor.dtype for key, tensor in checkpoint.tensors.items()}
    assert actual.pop("model.layers.1.mlp.gate.e_score_correction_bias") is torch.float32
    assert set(actual.values()) == {torch.bfloat16}


@pytest.mark.slow
def test_an_adapter_is_applied_to_a_reranker(saved_folder, tmp_path, open_by_name):
    adapt(tmp_path / "adapter", saved_folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    checkpoint = open_by_name(tmp_path / "adapter")
    assert checkpoint.name == str(tmp_path / "adapter")
    assert_holds(checkpoint, tiny.read_tensors(tmp_path / "merged"), tolerance=2e-6)
    assert {path.name for path in checkpoint.files} == {
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    check_compatible([checkpoint, open_by_name(saved_folder), open_by_name(tmp_path / "merged")])


@pytest.mark.slow
def test_an_adapter_is_applied_to_a_published_reranker(model, tmp_path, open_by_name):
    base = tiny.write_published(tmp_path / "published", model, tiny.published_tensors(model))
    adapt(tmp_path / "adapter", base).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_holds(open_by_name(tmp_path / "adapter"), tiny.read_tensors(tmp_path / "merged"), tolerance=2e-6)


def test_an_adapter_is_applied_to_an_adapter(saved_folders, tmp_path, open_by_name):
    first = adapt(tmp_path / "first", saved_folders("qwen3"), seed=1).merge_and_unload()
    make_adapter(tmp_path / "second", first, seed=2).merge_and_unload().save_pretrained(tmp_path / "merged")
    name_base(tmp_path / "second", tmp_path / "first")
    assert_holds(open_by_name(tmp_path / "second"), tiny.read_tensors(tmp_path / "merged"), tolerance=5e-6)


def test_files_of_equal_names_are_named_with_their_folders(saved_folders, tmp_path, open_by_name):
    adapt(tmp_path / "first", saved_folders("qwen3"))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    name_base(tmp_path / "second", tmp_path / "first")
    names = {
        f"{folder}/adapter_{file}" for folder in ("first", "second") for file in ("config.json", "model.safetensors")
    }
    assert open_by_name(tmp_path / "second").named_files().keys() == names | {"config.json", "model.safetensors"}


def test_an_adapter_that_is_its_own_base_is_refused(saved_folders, tmp_path, open_by_name):
    adapt(tmp_path / "both", saved_folders("qwen3"))
    name_base(tmp_path / "both", tmp_path / "both")
    with pytest.raises(ValueError, match="is both an adapter and its base model"):
        open_by_name(tmp_path / "both")


def test_a_plain_decoder_keeps_its_data_type(decoder, tmp_path, open_by_name):
    AutoModel.from_pretrained(decoder, dtype=torch.bfloat16).save_pretrained(decoder)
    make_adapter(tmp_path / "adapter", from_backbone(decoder))
    name_base(tmp_path / "adapter", decoder)
    assert {tensor.dtype for tensor in open_by_name(tmp_path / "adapter").tensors.values()} == {torch.bfloat16}


def test_the_revision_is_the_commit_of_a_repository(saved_folder, tmp_path, open_by_name):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--someone--name" / "snapshots" / commit
    shutil.copytree(saved_folder, snapshot)
    assert open_by_name(snapshot).revision == commit
    assert open_by_name(saved_folder).revision is None


@pytest.mark.slow
def test_adapters_are_applied_to_a_plain_decoder(decoder, tmp_path, open_by_name):
    for seed in (1, 2):
        adapted = make_adapter(tmp_path / f"adapter-{seed}", from_backbone(decoder), seed=seed)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"merged-{seed}")
        name_base(tmp_path / f"adapter-{seed}", decoder)
    for seed in (1, 2):
        checkpoint = open_by_name(tmp_path / f"adapter-{seed}")
        assert_holds(checkpoint, tiny.read_tensors(tmp_path / f"merged-{seed}"), tolerance=2e-6)
        check_trained(checkpoint)
        check_compatible([checkpoint, open_by_name(tmp_path / f"merged-{seed}")])
    assert sorted(path.name for path in decoder.iterdir()) == sorted(
        {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("base", ["reranker", "decoder"])
def test_the_adapter_of_a_training_run_equals_the_model_beside_it(saved_folders, decoder, tmp_path, open_by_name, base):
    from modeling_querit.training.train import main

    rows = [{"query": f"q {n}", "documents": [f"this is {n}", "nothing"], "labels": [1, 0]} for n in range(4)]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    name = str(decoder if base == "decoder" else saved_folders("qwen3"))
    settings = ["--train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run"), "--lora_rank", "2"]
    settings += ["--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no", "--report_to", "none"]
    main(["--model", name, *settings, "--use_cpu", "True", "--disable_tqdm", "True"])
    adapter, model = open_by_name(tmp_path / "run" / "adapter"), open_by_name(tmp_path / "run" / "model")
    assert_holds(adapter, {key: whole(tensor) for key, tensor in model.tensors.items()}, tolerance=1e-6)
    check_compatible([adapter, model])
    check_trained(adapter)
    with pytest.raises(FileNotFoundError, match=r"run has neither config\.json.*: name .*run/model"):
        open_by_name(tmp_path / "run")


# Checkpoints that cannot be opened


def test_an_empty_folder_is_refused(tmp_path, open_by_name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has neither config\.json nor adapter_config\.json\.$"):
        open_by_name(tmp_path / "empty")


@pytest.mark.parametrize(("inside", "named"), [(["model", "adapter"], "model"), (["adapter"], "adapter")])
def test_the_output_of_a_training_run_suggests_its_model(tmp_path, open_by_name, inside, named):
    for name in inside:
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf": name .*/run/{named}\.$"):
        open_by_name(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "There is no folder ./nowhere"),
        ("/nowhere/at/all", "There is no folder /nowhere/at/all"),
        ("no/such/folder", "no/such/folder is not a folder, and not a repository that could be reached"),
        ("nobody/nothing", "nobody/nothing is not a folder, and not a repository that could be reached"),
    ],
)
def test_a_missing_model_is_named(open_by_name, name, message):
    with pytest.raises(OSError, match=message):
        open_by_name(name)


def test_a_missing_base_is_named(saved_folders, tmp_path, open_by_name):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    name_base(tmp_path / "adapter", tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):
        open_by_name(tmp_path / "adapter")


def test_truncated_weights_are_named(saved_folder, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"damaged/model\.safetensors is damaged or truncated"):
        open_by_name(tmp_path / "damaged")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["score.bias", "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_missing_weight_is_named(saved_folder, tmp_path, open_by_name, key):
    folder = change(saved_folder, tmp_path / "lacking", lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        open_by_name(folder)


def test_a_missing_expert_is_named(saved_folders, tmp_path, open_by_name):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    source = saved_folders("deepseek_v3")
    folder = change(source, tmp_path / "lacking", lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        open_by_name(folder)


def test_a_weight_of_another_shape_is_named(saved_folder, tmp_path, open_by_name):
    folder = change(saved_folder, tmp_path / "three", lambda tensors: tensors | {"score.weight": torch.ones(3, 32)})
    with pytest.raises(ValueError, match=r"score\.weight has shape \(3, 32\)"):
        open_by_name(folder)


def test_a_checkpoint_without_safetensors_is_refused(saved_folder, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled has no safetensors files"):
        open_by_name(tmp_path / "pickled")


def test_a_checkpoint_without_a_tokenizer_is_refused(saved_folder, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises((ValueError, OSError), match="mute"):
        open_by_name(tmp_path / "mute")


def test_a_damaged_config_is_named(saved_folder, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match="damaged"):
        open_by_name(tmp_path / "damaged")


def test_a_config_that_is_not_an_object_is_refused(saved_folder, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        open_by_name(tmp_path / "other")


def test_a_head_under_the_keys_of_both_layouts_is_refused(saved_folder, tmp_path, open_by_name):
    two = change(saved_folder, tmp_path / "two", lambda tensors: tensors | {"head.weight": torch.ones(2, 32)})
    with pytest.raises(ValueError, match=r"has score\.weight twice, under the keys of two layouts"):
        open_by_name(two)


# Heads


@pytest.mark.slow
@pytest.mark.parametrize("head", [torch.zeros(2, 32), torch.ones(2, 32), torch.arange(32.0).expand(2, 32)])
def test_an_untrained_head_is_refused(saved_folder, tmp_path, open_by_name, head):
    folder = change(saved_folder, tmp_path / "new", lambda tensors: tensors | {"score.weight": head.contiguous()})
    checkpoint = open_by_name(folder)
    with pytest.raises(ValueError, match=r"The head of .*new was never trained: the rows of score\.weight are equal"):
        check_trained(checkpoint)


def test_a_trained_head_passes(saved_folder, open_by_name):
    checkpoint = open_by_name(saved_folder)
    check_trained(checkpoint)
    assert checkpoint.tensors["score.weight"].shape == (2, 32)
