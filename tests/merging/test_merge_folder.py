"""The folder of a merged model, its record and card, and merges that leave no folder."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from tiny_checkpoints import (
    adapt,
    assert_same,
    change,
    merged,
    read_files,
    vary,
)
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking, from_backbone
from modeling_querit.cards import merged_card
from modeling_querit.merging.merge import merge_checkpoints
from modeling_querit.merging.recipe import Recipe

# The folder


def test_it_has_the_files_of_a_saved_folder(whole_merge, family, tmp_path):
    QueritForSequenceRanking.from_pretrained(family[0]).save_pretrained(tmp_path / "saved")
    actual, expected = read_files(whole_merge), read_files(tmp_path / "saved")
    assert actual.keys() == expected.keys() | {"merge.json"}
    different = {name for name, content in expected.items() if actual[name] != content}
    assert different == {"model.safetensors", "README.md"}
    assert [path.name for path in whole_merge.parent.iterdir()] == [whole_merge.name]


@pytest.mark.slow
def test_every_runtime_loads_it(whole_merge):
    from sentence_transformers import CrossEncoder

    pairs = [pair for pair in tiny.pairs() if isinstance(pair[1], str) and pair[1]]
    model = QueritForSequenceRanking.from_pretrained(whole_merge)
    assert_same(model.state_dict(), AutoModel.from_pretrained(whole_merge).state_dict())
    expected = model.predict(pairs).tolist()
    assert len(set(expected)) == len(pairs)
    classifier = AutoModelForSequenceClassification.from_pretrained(whole_merge)
    assert type(classifier) is QueritForSequenceClassification
    assert classifier.predict(pairs).tolist() == pytest.approx(expected, abs=1e-5)
    encoder = CrossEncoder(str(whole_merge), device="cpu")
    assert encoder.predict(pairs).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_its_maximum_length_is_the_shortest_of_the_models(family, tmp_path):
    path = shutil.copytree(family[1], tmp_path / "short") / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 99}))
    merge_checkpoints(Recipe([family[0], str(path.parent)]), tmp_path / "new")
    lengths = [
        QueritForSequenceRanking.from_pretrained(folder).processor.max_length
        for folder in (family[0], tmp_path / "new")
    ]
    assert lengths[0] > lengths[1] == 99


@pytest.mark.slow
def test_shards_hold_the_same_tensors(family, tmp_path):
    expected = merged(tmp_path / "one", family[:2])
    merge_checkpoints(Recipe(family[:2]), tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert_same(tiny.read_tensors(tmp_path / "many"), expected)
    loaded = [QueritForSequenceRanking.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")]
    assert_same(*loaded)
    # Merged once more, the shards are read again.
    assert_same(merged(tmp_path / "again", [str(tmp_path / "many"), family[2]], t=["0"]), expected)


def test_no_file_contains_local_paths(whole_merge, families, architecture):
    local_paths = {str(folder.parent).encode() for folder in [whole_merge, *families(architecture)]}
    local_paths |= {str(Path.home()).encode(), str(Path(tiny.__file__).parents[1]).encode()}
    for name, content in read_files(whole_merge).items():
        assert not any(path in content for path in local_paths), name


def test_the_record_has_recipe_and_hashes(whole_merge, families, architecture):
    record = json.loads((whole_merge / "merge.json").read_text())
    assert record["recipe"] == {
        "models": ["law", "medicine"],
        "method": "slerp",
        "t": ["0.4"],
        "weights": [],
        "base": None,
        "scale": 1.0,
        "dtype": "auto",
    }
    assert [parent["name"] for parent in record["parents"]] == ["law", "medicine"]
    for folder, parent in zip(families(architecture)[:2], record["parents"], strict=True):
        names = ["config.json", "model.safetensors"]
        expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        assert parent["sha256"] == expected
    assert record["versions"]["torch"]


def test_the_record_of_an_adapter_includes_its_base(pair, tmp_path):
    adapt(tmp_path / "adapter", pair[0])
    merge_checkpoints(Recipe([str(tmp_path / "adapter"), pair[1]]), tmp_path / "new")
    first = json.loads((tmp_path / "new" / "merge.json").read_text())["parents"][0]
    digest = hashlib.sha256((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert first["name"] == f"./{tmp_path.name}/adapter"
    assert first["sha256"]["adapter_model.safetensors"] == digest
    assert first["sha256"].keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"t": ["0:1", "mlp=0.3"]},
        {"weights": ["1,2"], "method": "linear", "dtype": "bfloat16"},
        {"method": "task_arithmetic", "base": True, "scale": 0.7},
    ],
)
def test_the_record_is_a_recipe_of_the_same_merge(pair, saved_folders, tmp_path, monkeypatch, settings):
    for folder in pair:
        shutil.copytree(folder, tmp_path / Path(folder).name)
    shutil.copytree(saved_folders("qwen3"), tmp_path / "base")
    models = [str(tmp_path / Path(folder).name) for folder in pair]
    settings = settings | ({"base": str(tmp_path / "base")} if "base" in settings else {})
    # The names in a record are those of folders beside each other.
    monkeypatch.chdir(tmp_path)
    expected = merged(tmp_path / "one", models, **settings)
    recipe = Recipe.load(tmp_path / "one" / "merge.json")
    assert recipe.models == ["law", "medicine"]
    assert_same(tiny.read_tensors(merge_checkpoints(recipe, "two")), expected)
    one, two = read_files(tmp_path / "one"), read_files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}
    assert two["README.md"].replace(b"two", b"one") == one["README.md"].replace(b"two", b"one")


@pytest.mark.slow
def test_results_of_training_runs_are_told_apart(pair, tmp_path, monkeypatch):
    """`querit train` calls all its results `model`."""
    models = [shutil.copytree(folder, tmp_path / Path(folder).name / "model") for folder in pair]
    expected = merged(tmp_path / "one", [str(folder) for folder in models])
    record = json.loads((tmp_path / "one" / "merge.json").read_text())
    names = ["./law/model", "./medicine/model"]
    assert record["recipe"]["models"] == [parent["name"] for parent in record["parents"]] == names
    assert all(f"- `{name}`" in (tmp_path / "one" / "README.md").read_text() for name in names)
    assert "base_model" not in (tmp_path / "one" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    again = merge_checkpoints(Recipe.load("one/merge.json"), "two")
    assert_same(tiny.read_tensors(again), expected)


@pytest.mark.slow
def test_models_that_differ_from_the_record_are_refused(pair, tmp_path, monkeypatch):
    for folder in pair:
        shutil.copytree(folder, tmp_path / Path(folder).name)
    monkeypatch.chdir(tmp_path)
    merge_checkpoints(Recipe(["law", "medicine"]), "one")
    shutil.rmtree("medicine")
    shutil.copytree("law", "medicine")
    with pytest.raises(ValueError, match="medicine is not the model in the record"):
        merge_checkpoints(Recipe.load("one/merge.json"), "two")
    assert not (tmp_path / "two").exists()
    with pytest.raises(ValueError, match="medicine is not the model in the record"):
        merge_checkpoints(Recipe.load("one/merge.json", models=["law", "medicine"]), "two")


@pytest.mark.slow
def test_models_of_a_record_may_have_moved(pair, tmp_path, monkeypatch):
    for folder in pair:
        shutil.copytree(folder, tmp_path / "runs" / Path(folder).name / "model")
    monkeypatch.chdir(tmp_path)
    models = ["runs/law/model", "runs/medicine/model"]
    merge_checkpoints(Recipe(models, t=["0.3"]), "one")
    with pytest.raises(OSError, match=r"no folder \./law/model.* pass the model paths too"):
        merge_checkpoints(Recipe.load("one/merge.json"), "two")
    Path("runs").rename("moved")
    moved = [model.replace("runs", "moved") for model in models]
    merge_checkpoints(Recipe.load("one/merge.json", models=moved), "two")
    assert_same(tiny.read_tensors(tmp_path / "two"), tiny.read_tensors(tmp_path / "one"))
    for others in (moved[::-1], [moved[0], moved[0]]):
        with pytest.raises(ValueError, match="is not the model in the record"):
            merge_checkpoints(Recipe.load("one/merge.json", models=others), "three")
    with pytest.raises(ValueError, match="record has 2 models, but 3 are given"):
        Recipe.load("one/merge.json", models=[*moved, moved[0]], t=[])


@pytest.mark.slow
def test_the_base_may_be_a_plain_decoder(tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    AutoModel.from_config(tiny.make_text_config("qwen3")).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    base = from_backbone(tmp_path / "decoder")
    base.save_pretrained(tmp_path / "start")
    models = []
    for seed, name in enumerate(["law", "medicine"]):
        moved = vary(tmp_path / "start", tmp_path / f"headless-{name}", seed)
        head = {"score.weight": torch.randn(2, 32)}
        models.append(str(change(moved, tmp_path / name, lambda tensors, head=head: tensors | head)))
    expected = merged(tmp_path / "one", models, method="task_arithmetic", base=str(tmp_path / "start"))
    # The reranker made of the decoder is written where the next merge would find it after a kill, and remove it.
    saved_folders, save_pretrained = [], QueritForSequenceRanking.save_pretrained
    monkeypatch.setattr(
        QueritForSequenceRanking,
        "save_pretrained",
        lambda model, folder: saved_folders.append(Path(folder)) or save_pretrained(model, folder),
    )
    merged_tensors = merged(tmp_path / "two", models, method="task_arithmetic", base=str(tmp_path / "decoder"))
    [saved_folder] = saved_folders
    assert saved_folder.relative_to(tmp_path).parts[0].startswith(".two-")
    assert not saved_folder.exists()
    assert_same(merged_tensors, expected)


def test_arguments_take_precedence_over_a_recipe(pair, whole_merges):
    recipe = Recipe.load(whole_merges("qwen3") / "merge.json", models=pair, dtype="float16")
    assert (recipe.models, recipe.t, recipe.dtype) == (pair, ["0.4"], "float16")


def test_the_card_names_the_models(whole_merge):
    card = ModelCard.load(whole_merge / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-ranking"
    assert {"merge", "reranker", "querit", "sentence-transformers"} <= set(card.data.tags)
    # Folders are not models on the Hub.
    assert card.data.base_model is None
    assert "# merged\n" in card.text
    assert "- `law`\n- `medicine`\n" in card.text
    assert "slerp, t 0.4" in card.text
    assert 'CrossEncoder("merged", trust_remote_code=True)' in card.text


def test_the_card_links_to_repositories(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(
        ["Querit/Querit-4B", "somebody/law"], method="task_arithmetic", base="Qwen/Qwen3-4B", weights=["1,2"], scale=0.5
    )
    card = ModelCard(merged_card("new", recipe.public()))
    assert card.data.base_model == ["Qwen/Qwen3-4B", "Querit/Querit-4B", "somebody/law"]
    assert card.data.base_model_relation == "merge"
    assert "task_arithmetic, weights 1,2, scale 0.5" in card.text
    assert all(f"`{name}`" in card.text for name in card.data.base_model)


# Errors


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 1])
def test_nan_and_infinity_name_tensor_and_model(pair, tmp_path, value, index):
    key = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors):
        tensors[key][3, 5] = value
        return tensors

    models = list(pair)
    models[index] = str(change(pair[index], tmp_path / "spoilt", spoil))
    with pytest.raises(ValueError, match=rf"{re.escape(key)} of {re.escape(models[index])} holds NaN or infinite"):
        merge_checkpoints(Recipe(models), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_a_folder_with_content_is_not_touched(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    # The error comes before the models are opened.
    with pytest.raises(FileExistsError, match="new exists: name a new folder"):
        merge_checkpoints(Recipe(["./nowhere", "./nobody"]), tmp_path / "new")
    assert read_files(tmp_path / "new") == {"notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_empty_folder_is_filled(pair, tmp_path):
    (tmp_path / "new").mkdir()
    merge_checkpoints(Recipe(pair), tmp_path / "new")
    assert (tmp_path / "new" / "merge.json").exists()


def test_incompatible_models_leave_nothing_behind(families, tmp_path):
    models = [str(families(architecture)[0]) for architecture in tiny.ARCHITECTURES]
    with pytest.raises(ValueError, match="only models of one architecture can be merged"):
        merge_checkpoints(Recipe(models), tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_untrained_head_is_refused_except_in_a_base(pair, tmp_path):
    new = change(pair[0], tmp_path / "base", lambda tensors: tensors | {"score.weight": torch.zeros(2, 32)})
    with pytest.raises(ValueError, match=r"head of .*base was never trained"):
        merge_checkpoints(Recipe([pair[0], str(new)]), tmp_path / "new")
    merge_checkpoints(Recipe(pair, method="task_arithmetic", base=str(new)), tmp_path / "new")


def test_weights_of_zero_name_the_tensor(pair, tmp_path):
    with pytest.raises(ValueError, match=r"All weights of score\.(bias|weight) are 0"):
        merge_checkpoints(Recipe(pair, weights=["score=0,0"]), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_link_to_itself_is_refused(pair, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileExistsError, match="is a link to itself: name a new folder"):
        merge_checkpoints(Recipe(pair), tmp_path / "loop")


KILLED = """
import sys, time
from modeling_querit.merging import merge
from modeling_querit.merging.recipe import Recipe

weighted_sum, seen = merge.weighted_sum, []


def slow(*args):
    seen.append(None)
    if len(seen) == 9:
        print("merging", flush=True)
        time.sleep(100)
    return weighted_sum(*args)


merge.weighted_sum = slow
merge.merge_checkpoints(Recipe(sys.argv[1:3]), sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_merge_leaves_no_folder(pair, forked_python, tmp_path):
    command = [forked_python, "-c", KILLED, *pair, str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout.readline() == b"merging\n"
        # The merge is being written.
        assert list(tmp_path.rglob("model.safetensors"))
        # As abrupt as SIGKILL.
        process.send_signal(signal.SIGUSR1)
        process.wait()
    assert not (tmp_path / "new").exists()
    assert all(path.name.startswith(".new-") for path in tmp_path.iterdir())
    merge_checkpoints(Recipe(pair), tmp_path / "new")
    assert (tmp_path / "new" / "merge.json").exists()
    # The next merge removes what the killed one has left.
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
