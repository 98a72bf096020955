"""Recipes of merges: fields, files and command."""

import json
import shutil

import pytest
import tiny
from tiny_checkpoints import assert_same, merged

from modeling_querit.merging.recipe import Recipe, public_names

# Recipes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "A merge needs two models or more, not 0: name another one"),
        ({"models": ["a"]}, "A merge needs two models or more, not 1: name another one"),
        ({"method": "ties"}, "method is 'ties': choose from slerp, linear, task_arithmetic"),
        ({"method": "task_arithmetic"}, "task_arithmetic needs a base: name the model"),
        ({"base": "c"}, "slerp has no use for a base: leave it out"),
        ({"scale": 0.5}, "scale is the factor of task vectors, which slerp does not have"),
        ({"t": ["0.5"], "weights": ["1,2"]}, "t is a position between two models"),
        ({"models": ["a", "b", "c"], "t": ["0.5"]}, "for more than two, give weights instead"),
        ({"base": 5, "method": "task_arithmetic"}, "base is 5: give the name of a model"),
        ({"dtype": "int8"}, "dtype is 'int8': choose auto, float32, bfloat16 or float16"),
        ({"method": "task_arithmetic", "base": "c", "scale": float("nan")}, "scale"),
        ({"method": "task_arithmetic", "base": "c", "scale": float("inf")}, "scale"),
    ],
)
def test_contradictory_recipes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"models": ["a", "b"]} | settings)


def test_a_recipe_is_loaded_from_its_fields(pair, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"models": pair, "t": ["0.4"], "dtype": "float16"}))
    assert Recipe.load(tmp_path / "recipe.json") == Recipe(pair, t=["0.4"], dtype="float16")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '"ab"', "{}", '{"models": null}', '{"models": ["a", "b"], "colour": 1}', '{"recipe": [1]}'],
)
def test_malformed_recipes_are_refused(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.json.*(is not a|Expecting)|two models or more|models"):
        Recipe.load(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    "settings", [{"t": 0.4}, {"t": [0.4]}, {"t": {"mlp": 0.4}}, {"weights": [1, 2]}, {"weights": [[1, 2]]}, {"t": None}]
)
def test_numbers_instead_of_texts_are_read_or_refused_in_one_line(querit, pair, tmp_path, settings):
    (tmp_path / "recipe.json").write_text(json.dumps({"models": pair} | settings))
    code, _, err = querit("merge", "--recipe", tmp_path / "recipe.json", "-o", tmp_path / "new")
    assert (code, err.count("\n")) in [(0, 0), (2, 1)]


# Public names


@pytest.fixture
def folders(tmp_path):
    """Make folders by their names; their paths."""

    def make(*names):
        for name in names:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return [str(tmp_path / name) for name in names]

    return make


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["runs/law", "runs/medicine"], ["law", "medicine"]),
        (["runs/law/model", "runs/medicine/model"], ["./law/model", "./medicine/model"]),
        (["runs/law/adapter", "runs/medicine"], ["./law/adapter", "medicine"]),
        (["a/runs/law", "b/runs/law", "c"], ["./a/runs/law", "./b/runs/law", "c"]),
        (["runs/law", "runs/law"], ["law", "law"]),
        (["runs/mini", "law"], ["./mini", "law"]),
        # These differ only near the root, where a path names people and machines.
        (["a/x/y/model", "b/x/y/model", "c"], ["./y/model-1", "./y/model-2", "c"]),
        (["a/x/y/law", "b/x/y/law", "law-1", "a/x/y/law"], ["law-2", "law-3", "law-1", "law-2"]),
    ],
)
def test_folders_are_named_by_the_ends_of_their_paths(folders, names, expected):
    assert public_names(folders(*names)) == expected


def test_names_of_repositories_stay_as_they_are(folders):
    assert public_names(["mini", "someone/law", *folders("law")]) == ["mini", "someone/law", "law"]


def test_relative_paths_are_resolved(folders, monkeypatch):
    (path,) = folders("runs/law")
    monkeypatch.chdir(path)
    assert public_names(["."]) == ["law"]
    assert public_names(["../law"]) == ["law"]


def test_the_root_has_a_name(folders):
    assert public_names(["/"]) == ["./"]


# The command


@pytest.mark.slow
def test_the_command_merges(querit, pair, tmp_path):
    code, out, _ = querit("merge", *pair, "--t", "0.3", "--t", "mlp=0:1", "-o", tmp_path / "new")
    assert (code, out) == (0, f"Wrote {tmp_path / 'new'}\n")
    expected = merged(tmp_path / "expected", pair, t=["0.3", "mlp=0:1"])
    assert_same(tiny.read_tensors(tmp_path / "new"), expected)


@pytest.mark.slow
def test_the_command_with_all_options(querit, families, saved_folders, tmp_path):
    family, saved_folder = [str(folder) for folder in families("qwen3")], saved_folders("qwen3")
    options = ["--method", "task_arithmetic", "--base", saved_folder, "--scale", "0.5", "--weights", "1,2,1"]
    options += ["--weights", "score=1,0,0", "--dtype", "bfloat16", "--max-shard-size", "30KB", "--output"]
    assert querit("merge", *family, *options, tmp_path / "new")[0] == 0
    settings = {"method": "task_arithmetic", "base": str(saved_folder), "scale": 0.5, "dtype": "bfloat16"}
    expected = merged(tmp_path / "expected", family, weights=["1,2,1", "score=1,0,0"], **settings)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert_same(tiny.read_tensors(tmp_path / "new"), expected)


def test_the_command_with_a_recipe(querit, pair, whole_merges, tmp_path):
    record = whole_merges("qwen3") / "merge.json"
    code, _, err = querit("merge", *pair, "--recipe", record, "-o", tmp_path / "new")
    assert code == 0, err
    assert_same(tiny.read_tensors(tmp_path / "new"), tiny.read_tensors(whole_merges("qwen3")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--t", "2"], "t is 2: it must be in [0, 1]"),
        (["--t", "half"], "'half' is not a number"),
        (["--t", "gate=1"], "there is no group 'gate'"),
        (["--weights", "1,2,3"], "give 2 of them"),
        (["--weights", "0,0"], "All weights of"),
        (["--method", "ties"], "method is 'ties'"),
        (["--scale", "2"], "scale is the factor of task vectors"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--max-shard-size", "huge"], "huge"),
        (["--recipe", "nowhere.json"], "nowhere.json"),
        (["./nowhere"], "There is no folder ./nowhere"),
    ],
)
def test_errors_are_one_line_and_code_2(querit, pair, tmp_path, options, message):
    code, out, err = querit("merge", *pair, *options, "--output", tmp_path / "new")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("querit: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_file_and_a_single_model_are_refused(querit, pair, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = querit("merge", *pair, "-o", tmp_path / "file")
    assert code == 2
    assert "file exists: name a new folder" in err
    code, _, err = querit("merge", pair[0], "-o", tmp_path / "new")
    assert (code, err) == (2, "querit: A merge needs two models or more, not 1: name another one.\n")


def test_a_damaged_model_is_one_line(querit, pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = querit("merge", tmp_path / "damaged", pair[1], "-o", tmp_path / "new")
    assert code == 2
    assert "damaged or truncated" in err
    assert err.count("\n") == 1
