"""Whole merges, against slow formulas, and all that may go wrong."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from tiny_parents import adapt, bits, change, slow_karcher, slow_linear, slow_slerp, vary
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking
from modeling_querit.checkpoints import merge, streaming
from modeling_querit.checkpoints.cards import merged_card
from modeling_querit.checkpoints.merge import Recipe, merge_checkpoints, opened
from modeling_querit.checkpoints.streaming import StoredTensor
from modeling_querit.cli import main

ROUTING_BIAS = "e_score_correction_bias"


@pytest.fixture(scope="session")
def families(saved_folders, tmp_path_factory):
    """Three models of an architecture in one dtype, as folders. Tests copy before they change anything."""
    made = {}

    def get(architecture, dtype=torch.float32):
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp("family")
            made[architecture, dtype] = [
                vary(saved_folders(architecture), folder / name, seed, dtype)
                for seed, name in enumerate(["law", "medicine", "code"])
            ]
        return made[architecture, dtype]

    return get


@pytest.fixture
def family(families, architecture):
    return [str(folder) for folder in families(architecture)]


@pytest.fixture
def pair(families):
    """Two models of the smaller architecture, for what has nothing to do with it."""
    return [str(folder) for folder in families("qwen3")[:2]]


def merged(folder, models, **settings):
    return tiny.read_tensors(merge_checkpoints(Recipe(models, **settings), folder))


def tensors_of(folders):
    """Key -> the tensor of each model, in float64 numpy."""
    read = [tiny.read_tensors(Path(folder)) for folder in folders]
    return {key: [each[key].double().numpy() for each in read] for key in read[0]}


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_allclose(found[key].double().numpy(), tensor, rtol=rtol, atol=atol, err_msg=key)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype, key
        assert bits(found[key]) == bits(tensor), key


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(capsys, *argv):
    """Exit code, standard output and standard error of `querit`."""
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


# Numbers


def test_two_models_are_merged_by_slerp(family, tmp_path):
    t = 0.3
    found = merged(tmp_path / "new", family[:2], t=[str(t)])
    expected = {key: slow_slerp(*tensors, t) for key, tensors in tensors_of(family[:2]).items()}
    assert_close(found, expected)
    # Some pairs are far apart, so that a linear mean would be another one.
    linear = {key: slow_linear(tensors, [1 - t, t]) for key, tensors in tensors_of(family[:2]).items()}
    assert sum(np.abs(linear[key] - each).max() > 1e-3 for key, each in expected.items()) > 5


def test_half_precision_is_rounded_once(families, architecture, tmp_path):
    models = [str(folder) for folder in families(architecture, torch.bfloat16)[:2]]
    found = merged(tmp_path / "new", models, t=["0.3"])
    for key, tensors in tensors_of(models).items():
        exact = slow_slerp(*tensors, 0.3)
        is_routing = key.endswith(ROUTING_BIAS)
        assert found[key].dtype is (torch.float32 if is_routing else torch.bfloat16), key
        # Half a unit in the last of eight places, and what float32 is off by.
        off = np.abs(found[key].double().numpy() - exact) - (1e-6 if is_routing else 2**-8) * np.abs(exact)
        assert off.max() < 1e-6, key


def test_three_models_have_a_mean_direction_in_the_middle(families, tmp_path):
    family = [str(folder) for folder in families("qwen3")]
    found = merged(tmp_path / "new", family, weights=["1,2,1"])
    for key, tensors in tensors_of(family).items():
        cosines = [a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b) for a in tensors for b in tensors]
        if min(cosines) > 0.9995:
            np.testing.assert_allclose(found[key].numpy(), slow_linear(tensors, [1, 2, 1]), rtol=1e-5, atol=1e-6)
            continue
        # The factors that make the mean direction of the three directions add up the tensors themselves.
        units = np.stack([each.ravel() / np.linalg.norm(each) for each in tensors])
        if np.linalg.matrix_rank(units) < 3:
            continue
        factors = np.linalg.lstsq(units.T, slow_karcher(units, [1, 2, 1]), rcond=None)[0]
        expected = sum(factor * each for factor, each in zip(factors, tensors, strict=True))
        np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0]])
def test_order_does_not_matter(families, tmp_path, order):
    family = [str(folder) for folder in families("qwen3")]
    weights = [1, 2, 3]
    expected = merged(tmp_path / "one", family, weights=["1,2,3"])
    shuffled = ",".join(str(weights[place]) for place in order)
    found = merged(tmp_path / "two", [family[place] for place in order], weights=[shuffled])
    assert_close(found, {key: tensor.double().numpy() for key, tensor in expected.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "place"), [("0", 0), ("1:1", 1)])
def test_at_the_ends_are_the_models_themselves(families, architecture, tmp_path, dtype, t, place):
    models = [str(folder) for folder in families(architecture, dtype)[:2]]
    assert_same(merged(tmp_path / "new", models, t=[t]), tiny.read_tensors(Path(models[place])))


def test_all_the_weight_on_one_model_gives_it(family, tmp_path):
    found = merged(tmp_path / "new", family, weights=["0,0,5"])
    assert_same(found, tiny.read_tensors(Path(family[2])))


def test_a_model_merged_with_itself_stays_what_it_is(pair, tmp_path):
    assert_same(merged(tmp_path / "new", [pair[0], pair[0]]), tiny.read_tensors(Path(pair[0])))


def test_linear_is_the_weighted_mean(family, tmp_path):
    found = merged(tmp_path / "new", family, method="linear", weights=["1,2,5"])
    assert_close(found, {key: slow_linear(tensors, [1, 2, 5]) for key, tensors in tensors_of(family).items()})


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.5])
def test_task_arithmetic(family, saved_folder, tmp_path, scale):
    found = merged(
        tmp_path / "new", family, method="task_arithmetic", base=str(saved_folder), weights=["1,1,2"], scale=scale
    )
    expected = {}
    for key, (base, *tensors) in tensors_of([saved_folder, *family]).items():
        expected[key] = base + scale * slow_linear([each - base for each in tensors], [1, 1, 2])
    assert_close(found, expected)
    if scale == 0:
        assert_same(found, tiny.read_tensors(saved_folder))


def test_groups_and_layers_have_their_own_t(families, tmp_path):
    models = [str(folder) for folder in families("deepseek_v3")[:2]]
    found = merged(tmp_path / "new", models, t=["0:1", "experts=0.25", "score=0"])
    one, two = (tiny.read_tensors(Path(folder)) for folder in models)
    experts = "model.layers.1.mlp.experts.3.up_proj.weight"
    np.testing.assert_allclose(
        found[experts].numpy(), slow_slerp(one[experts].numpy(), two[experts].numpy(), 0.25), rtol=1e-5, atol=1e-6
    )
    for key in ("score.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert bits(found[key]) == bits(one[key]), key
    for key in ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.gate.weight"):
        assert bits(found[key]) == bits(two[key]), key


def test_the_size_of_parts_does_not_matter(family, tmp_path, monkeypatch):
    expected = merged(tmp_path / "large", family, weights=["1,2,3"])
    monkeypatch.setattr(streaming, "CHUNK", 100)
    found = merged(tmp_path / "small", family, weights=["1,2,3"])
    assert_close(found, {key: tensor.double().numpy() for key, tensor in expected.items()})


def test_the_layout_of_parents_does_not_matter(model, families, saved_folder, tmp_path):
    other = str(families(model.config.text_config.model_type)[1])
    published = tiny.write_published(tmp_path / "published", model, tiny.published_tensors(model, ""), shards=3)
    assert_same(
        merged(tmp_path / "one", [str(published), other], t=["0.4"]),
        merged(tmp_path / "two", [str(saved_folder), other], t=["0.4"]),
    )


def test_adapters_are_merged_as_what_they_make_of_their_base(pair, tmp_path):
    adapt(tmp_path / "adapter", pair[0]).merge_and_unload().save_pretrained(tmp_path / "whole")
    found = merged(tmp_path / "one", [str(tmp_path / "adapter"), pair[1]], t=["0.4"])
    expected = merged(tmp_path / "two", [str(tmp_path / "whole"), pair[1]], t=["0.4"])
    assert_close(found, {key: tensor.double().numpy() for key, tensor in expected.items()}, atol=1e-5)


# Dtypes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for(families, tmp_path, dtype):
    models = [str(folder) for folder in families("deepseek_v3")[:2]]
    found = merged(tmp_path / "new", models, dtype=dtype)
    routing = {key: tensor.dtype for key, tensor in found.items() if key.endswith(ROUTING_BIAS)}
    assert set(routing.values()) == {torch.float32}
    assert {tensor.dtype for key, tensor in found.items() if key not in routing} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == dtype
    loaded = QueritForSequenceRanking.from_pretrained(tmp_path / "new")
    assert loaded.dtype is getattr(torch, dtype)
    expected = merged(tmp_path / "exact", models, dtype="float32")
    assert_same(found, {key: each.to(found[key].dtype) for key, each in expected.items()})


def test_models_in_different_dtypes_give_the_wider_one(families, tmp_path):
    wide, half = families("qwen3")[0], families("qwen3", torch.bfloat16)[1]
    found = merged(tmp_path / "new", [str(half), str(wide)], t=["0.5"])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_close(found, {key: slow_slerp(*tensors, 0.5) for key, tensors in tensors_of([half, wide]).items()})
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_what_a_dtype_cannot_hold_is_not_written(pair, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    large = change(pair[0], tmp_path / "large", lambda tensors: tensors | {key: tensors[key] * 1e6})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        merge_checkpoints(Recipe([str(large), pair[1]], dtype="float16"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_quantized_weights_are_refused(pair, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    folder = change(pair[0], tmp_path / "small", lambda tensors: tensors | {key: tensors[key].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{re.escape(key)}.* is stored as torch\.float8_e4m3fn: quantized"):
        merge_checkpoints(Recipe([str(folder), pair[1]]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# The folder


@pytest.fixture(scope="session")
def whole_merges(families, tmp_path_factory):
    """One merged folder per architecture. Tests copy before they change anything."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("merged") / "merged"
            merge_checkpoints(Recipe([str(each) for each in families(architecture)[:2]], t=["0.4"]), folder)
            made[architecture] = folder
        return made[architecture]

    return get


@pytest.fixture
def whole_merge(whole_merges, architecture):
    return whole_merges(architecture)


def test_it_holds_what_a_saved_folder_holds(whole_merge, family, tmp_path):
    QueritForSequenceRanking.from_pretrained(family[0]).save_pretrained(tmp_path / "saved")
    found, expected = files_of(whole_merge), files_of(tmp_path / "saved")
    assert found.keys() == expected.keys() | {"merge.json"}
    different = {name for name, content in expected.items() if found[name] != content}
    assert different == {"model.safetensors", "README.md"}
    assert [path.name for path in whole_merge.parent.iterdir()] == [whole_merge.name]


def test_every_runtime_loads_it(whole_merge):
    from sentence_transformers import CrossEncoder

    texts = [each for each in tiny.pairs() if isinstance(each[1], str) and each[1]]
    model = QueritForSequenceRanking.from_pretrained(whole_merge)
    assert_same(model.state_dict(), AutoModel.from_pretrained(whole_merge).state_dict())
    expected = model.predict(texts).tolist()
    assert len(set(expected)) == len(texts)
    classifier = AutoModelForSequenceClassification.from_pretrained(whole_merge)
    assert type(classifier) is QueritForSequenceClassification
    assert classifier.predict(texts).tolist() == pytest.approx(expected, abs=1e-5)
    encoder = CrossEncoder(str(whole_merge), device="cpu")
    assert encoder.predict(texts).tolist() == pytest.approx(expected, abs=1e-5)


def test_shards(family, tmp_path):
    expected = merged(tmp_path / "one", family[:2])
    merge_checkpoints(Recipe(family[:2]), tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert_same(tiny.read_tensors(tmp_path / "many"), expected)
    loaded = [QueritForSequenceRanking.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")]
    assert_same(*loaded)
    # Merged once more, the shards are read again.
    assert_same(merged(tmp_path / "again", [str(tmp_path / "many"), family[2]], t=["0"]), expected)


def test_no_file_names_a_place_on_this_machine(whole_merge, families, architecture):
    places = {str(folder.parent).encode() for folder in [whole_merge, *families(architecture)]}
    places |= {str(Path.home()).encode(), str(Path(tiny.__file__).parents[1]).encode()}
    for name, content in files_of(whole_merge).items():
        assert not any(place in content for place in places), name


def test_the_record(whole_merge, families, architecture):
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
    assert [each["name"] for each in record["parents"]] == ["law", "medicine"]
    for folder, each in zip(families(architecture)[:2], record["parents"], strict=True):
        names = ["config.json", "model.safetensors"]
        expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        assert each["sha256"] == expected
    assert record["versions"]["torch"]


def test_the_record_of_an_adapter_has_the_hashes_of_both(pair, tmp_path):
    adapt(tmp_path / "adapter", pair[0])
    merge_checkpoints(Recipe([str(tmp_path / "adapter"), pair[1]]), tmp_path / "new")
    first = json.loads((tmp_path / "new" / "merge.json").read_text())["parents"][0]
    digest = hashlib.sha256((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert first["name"] == "adapter"
    assert first["sha256"]["adapter_model.safetensors"] == digest
    assert first["sha256"].keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"t": ["0:1", "mlp=0.3"]},
        {"weights": ["1,2"], "method": "linear", "dtype": "bfloat16"},
        {"method": "task_arithmetic", "base": True, "scale": 0.7},
    ],
)
def test_the_record_is_a_recipe(pair, saved_folders, tmp_path, monkeypatch, settings):
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
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md"}
    assert two["README.md"].replace(b"two", b"one") == one["README.md"].replace(b"two", b"one")


def test_what_is_given_besides_a_recipe_takes_precedence(pair, whole_merges):
    recipe = Recipe.load(whole_merges("qwen3") / "merge.json", models=pair, dtype="float16")
    assert (recipe.models, recipe.t, recipe.dtype) == (pair, ["0.4"], "float16")


def test_the_card(whole_merge):
    card = ModelCard.load(whole_merge / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-ranking"
    assert {"merge", "reranker", "querit", "sentence-transformers"} <= set(card.data.tags)
    # Folders are no models of the Hub.
    assert card.data.base_model is None
    assert "# merged\n" in card.text
    assert "- `law`\n- `medicine`\n" in card.text
    assert "slerp, t 0.4" in card.text
    assert 'CrossEncoder("merged", trust_remote_code=True)' in card.text


def test_the_card_of_repositories_links_to_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(
        ["Querit/Querit-4B", "somebody/law"], method="task_arithmetic", base="Qwen/Qwen3-4B", weights=["1,2"], scale=0.5
    )
    card = ModelCard(merged_card("new", recipe.published()))
    assert card.data.base_model == ["Qwen/Qwen3-4B", "Querit/Querit-4B", "somebody/law"]
    assert card.data.base_model_relation == "merge"
    assert "task_arithmetic, weights 1,2, scale 0.5" in card.text
    assert all(f"`{name}`" in card.text for name in card.data.base_model)


# What goes wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_names_tensor_and_model(pair, tmp_path, value, place):
    key = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors):
        tensors[key][3, 5] = value
        return tensors

    models = list(pair)
    models[place] = str(change(pair[place], tmp_path / "spoilt", spoil))
    with pytest.raises(ValueError, match=rf"{re.escape(key)} of {re.escape(models[place])} holds NaN or infinite"):
        merge_checkpoints(Recipe(models), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    # Told before the models are looked for.
    with pytest.raises(FileExistsError, match="new exists: name a new folder"):
        merge_checkpoints(Recipe(["./nowhere", "./nobody"]), tmp_path / "new")
    assert files_of(tmp_path / "new") == {"notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_empty_folder_is_filled(pair, tmp_path):
    (tmp_path / "new").mkdir()
    merge_checkpoints(Recipe(pair), tmp_path / "new")
    assert (tmp_path / "new" / "merge.json").exists()


def test_models_that_do_not_go_together_leave_nothing_behind(families, tmp_path):
    models = [str(families(each)[0]) for each in tiny.ARCHITECTURES]
    with pytest.raises(ValueError, match="only models of one architecture can be merged"):
        merge_checkpoints(Recipe(models), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_head_that_was_never_trained_is_refused_but_not_in_a_base(pair, tmp_path):
    new = change(pair[0], tmp_path / "base", lambda tensors: tensors | {"score.weight": torch.zeros(2, 32)})
    with pytest.raises(ValueError, match=r"head of .*base was never trained"):
        merge_checkpoints(Recipe([pair[0], str(new)]), tmp_path / "new")
    merge_checkpoints(Recipe(pair, method="task_arithmetic", base=str(new)), tmp_path / "new")


def test_weights_that_are_all_zero_name_the_tensor(pair, tmp_path):
    with pytest.raises(ValueError, match=r"All weights of score\.(bias|weight) are 0"):
        merge_checkpoints(Recipe(pair, weights=["score=0,0"]), tmp_path / "new")
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from modeling_querit.checkpoints import merge

add_up, seen = merge.add_up, []


def slow(*args):
    seen.append(None)
    if len(seen) == 9:
        print("merging", flush=True)
        time.sleep(100)
    return add_up(*args)


merge.add_up = slow
merge.merge_checkpoints(merge.Recipe(sys.argv[1:3]), sys.argv[3])
"""


def test_a_merge_that_is_killed_leaves_no_folder(pair, tmp_path):
    command = [sys.executable, "-c", KILLED, *pair, str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout.readline() == b"merging\n"
        # It is in the middle of writing.
        assert list(tmp_path.rglob("model.safetensors"))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "new").exists()
    assert all(path.name.startswith(".new-") for path in tmp_path.iterdir())
    merge_checkpoints(Recipe(pair), tmp_path / "new")
    assert (tmp_path / "new" / "merge.json").exists()


# Several merges of the same models


def test_what_is_known_of_tensors_is_not_computed_again(family, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 300)
    grams, reads = [], []
    gram_of, read = merge.gram_of, StoredTensor.read
    monkeypatch.setattr(merge, "gram_of", lambda chunk: grams.append(None) or gram_of(chunk))
    monkeypatch.setattr(StoredTensor, "read", lambda self, rows: reads.append(self.offset) or read(self, rows))
    recipes = {name: Recipe(family[:2], t=[t]) for name, t in [("one", "0.3"), ("two", "0.8"), ("three", "0.3")]}
    counts = []
    with opened(recipes["one"]) as merger:
        for name, recipe in recipes.items():
            grams.clear(), reads.clear()
            (tmp_path / name).mkdir()
            merger.write(tmp_path / name, recipe, name)
            counts.append((len(grams), len(reads)))
    assert counts[0][0] > 100
    assert counts[1] == counts[2]
    assert counts[1][0] == 0
    assert counts[1][1] < 0.6 * counts[0][1]
    assert_same(tiny.read_tensors(tmp_path / "three"), tiny.read_tensors(tmp_path / "one"))
    for name in ("one", "two"):
        fresh = merged(tmp_path / f"fresh {name}", family[:2], t=recipes[name].t)
        assert_same(tiny.read_tensors(tmp_path / name), fresh)
        assert QueritForSequenceRanking.from_pretrained(tmp_path / name).config.text_config.num_hidden_layers == 2


def test_a_model_without_numbers_is_refused_the_second_time_too(pair, tmp_path):
    key = "score.bias"
    spoilt = change(pair[1], tmp_path / "spoilt", lambda tensors: tensors | {key: torch.tensor([0, float("nan")])})
    recipe = Recipe([pair[0], str(spoilt)])
    with opened(recipe) as merger:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            with pytest.raises(ValueError, match=r"score\.bias of .*spoilt holds NaN"):
                merger.write(tmp_path / name, recipe, name)


# Recipes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "There is nothing to merge it with: name two models or more"),
        ({"models": ["a"]}, "There is nothing to merge a with: name two models or more"),
        ({"method": "ties"}, "method is 'ties': choose from slerp, linear, task_arithmetic"),
        ({"method": "task_arithmetic"}, "base goes with task_arithmetic"),
        ({"base": "c"}, "base goes with task_arithmetic"),
        ({"scale": 0.5}, "scale is that of task vectors"),
        ({"t": ["0.5"], "weights": ["1,2"]}, "t is the way from one model to another"),
        ({"models": ["a", "b", "c"], "t": ["0.5"]}, "for more than two, give weights instead"),
        ({"dtype": "int8"}, "dtype is 'int8': choose auto, float32, bfloat16 or float16"),
        ({"method": "task_arithmetic", "base": "c", "scale": float("nan")}, "scale"),
        ({"method": "task_arithmetic", "base": "c", "scale": float("inf")}, "scale"),
    ],
)
def test_a_recipe_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"models": ["a", "b"]} | settings)


def test_a_recipe_by_hand(pair, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"models": pair, "t": ["0.4"], "dtype": "float16"}))
    assert Recipe.load(tmp_path / "recipe.json") == Recipe(pair, t=["0.4"], dtype="float16")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '"ab"', "{}", '{"models": null}', '{"models": ["a", "b"], "colour": 1}', '{"recipe": [1]}'],
)
def test_what_is_no_recipe(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"is no recipe .*: give JSON with the keys|nothing to merge|models"):
        Recipe.load(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    "settings", [{"t": 0.4}, {"t": [0.4]}, {"t": {"mlp": 0.4}}, {"weights": [1, 2]}, {"weights": [[1, 2]]}, {"t": None}]
)
def test_a_recipe_with_numbers_for_texts_is_read_or_refused_in_one_line(capsys, pair, tmp_path, settings):
    (tmp_path / "recipe.json").write_text(json.dumps({"models": pair} | settings))
    code, _, err = run(capsys, "merge", "--recipe", tmp_path / "recipe.json", "-o", tmp_path / "new")
    assert (code, err.count("\n")) in [(0, 0), (2, 1)]


# From a shell


def test_the_command(capsys, pair, tmp_path):
    code, out, _ = run(capsys, "merge", *pair, "--t", "0.3", "--t", "mlp=0:1", "-o", tmp_path / "new")
    assert (code, out) == (0, f"Wrote {tmp_path / 'new'}\n")
    expected = merged(tmp_path / "expected", pair, t=["0.3", "mlp=0:1"])
    assert_same(tiny.read_tensors(tmp_path / "new"), expected)


def test_the_command_with_all_its_options(capsys, families, saved_folders, tmp_path):
    family, saved_folder = [str(folder) for folder in families("qwen3")], saved_folders("qwen3")
    options = ["--method", "task_arithmetic", "--base", saved_folder, "--scale", "0.5", "--weights", "1,2,1"]
    options += ["--weights", "score=1,0,0", "--dtype", "bfloat16", "--max-shard-size", "30KB", "--output"]
    assert run(capsys, "merge", *family, *options, tmp_path / "new")[0] == 0
    settings = {"method": "task_arithmetic", "base": str(saved_folder), "scale": 0.5, "dtype": "bfloat16"}
    expected = merged(tmp_path / "expected", family, weights=["1,2,1", "score=1,0,0"], **settings)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert_same(tiny.read_tensors(tmp_path / "new"), expected)


def test_the_command_with_a_recipe(capsys, pair, whole_merges, tmp_path):
    record = whole_merges("qwen3") / "merge.json"
    code, _, err = run(capsys, "merge", *pair, "--recipe", record, "-o", tmp_path / "new")
    assert code == 0, err
    assert_same(tiny.read_tensors(tmp_path / "new"), tiny.read_tensors(whole_merges("qwen3")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--t", "2"], "t is 2: it goes from 0"),
        (["--t", "half"], "'half' is no number"),
        (["--t", "gate=1"], "there is no group 'gate'"),
        (["--weights", "1,2,3"], "2 models need 2"),
        (["--weights", "0,0"], "All weights of"),
        (["--method", "ties"], "method is 'ties'"),
        (["--scale", "2"], "scale is that of task vectors"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--max-shard-size", "huge"], "huge"),
        (["--recipe", "nowhere.json"], "nowhere.json"),
        (["./nowhere"], "nowhere is no folder"),
    ],
)
def test_errors_are_one_line_and_code_2(capsys, pair, tmp_path, options, message):
    code, out, err = run(capsys, "merge", *pair, *options, "--output", tmp_path / "new")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("querit: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_destination_that_exists_and_one_model_alone(capsys, pair, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = run(capsys, "merge", *pair, "-o", tmp_path / "file")
    assert code == 2
    assert "file exists: name a new folder" in err
    code, _, err = run(capsys, "merge", pair[0], "-o", tmp_path / "new")
    assert (code, err) == (2, f"querit: There is nothing to merge {pair[0]} with: name two models or more.\n")


def test_a_damaged_model(capsys, pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run(capsys, "merge", tmp_path / "damaged", pair[1], "-o", tmp_path / "new")
    assert code == 2
    assert "damaged or cut short" in err
    assert err.count("\n") == 1
