import time
from itertools import pairwise

import pytest

from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.merging.recipe import Recipe
from modeling_querit.settings_files import read_settings
from modeling_querit.training.arguments import parse

# The files that commands read settings from, one way.
READERS = {
    "train": lambda path: parse([str(path)]),
    "adapt": AdaptSettings.load,
    "merge": Recipe.load,
}


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.yaml"


def test_yaml_numbers_without_a_point_are_numbers(path):
    """YAML 1.1 reads 1e-6 as text, also in mappings, whose values have no declared type."""
    path.write_text("lr_scheduler_kwargs: {min_lr: 1e-6}\nlearning_rate: 5e-5\nmodel: e5\n")
    assert read_settings(path) == {"lr_scheduler_kwargs": {"min_lr": 1e-6}, "learning_rate": 5e-5, "model": "e5"}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("name", ["config.yaml", "config.yml", "config.json"])
def test_yaml_and_json_are_told_apart_by_name(tmp_path, name, mark):
    (tmp_path / name).write_bytes(mark + b'{"model": "mini", "t": ["0.4"]}')
    assert read_settings(tmp_path / name) == {"model": "mini", "t": ["0.4"]}


def test_aliases_and_merge_keys_are_allowed(path):
    path.write_text("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    assert read_settings(path) == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}


def bomb(line):
    """Ten levels of ten aliases each: ten billion values."""
    names = "abcdefghijk"
    lines = [f"a: &a {line}"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in pairwise(names)]
    return "\n".join(lines) + "\n"


MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb("[lol]"), r"config\.yaml holds more than 100,000 values"),
        (MERGE_BOMB, r"config\.yaml holds more than 100,000 values"),
        ("model: &a [*a]\n", r"config\.yaml, line 1: an alias refers to itself"),
        ("x: 1\nmodel: &a\n  b: *a\n", r"config\.yaml, line 2: an alias refers to itself"),
        ("model: &a {<<: *a}\n", r"config\.yaml, line 1: an alias refers to itself"),
        ("model: " + "[" * 20_000, r"config\.yaml is nested too deeply"),
        ("model: " + "{a: " * 5_000, r"config\.yaml is nested too deeply"),
        ("model: *nobody\n", r"config\.yaml, line 1: found undefined alias"),
        ("a: 1\nmodel: [1,\n", r"config\.yaml, line \d: "),
        ("seed: 2024-99-99\n", r"config\.yaml has a value that YAML cannot read: month must be"),
        ("seed: !!timestamp x\n", r"config\.yaml has a value that YAML cannot read"),
        ("seed: !!bool maybe\n", r"config\.yaml has a value that YAML cannot read"),
        ("seed: !!int x\n", r"config\.yaml has a value that YAML cannot read"),
        ("seed: !!python/object/apply:os.system [ls]\n", r"config\.yaml, line 1: could not determine a constructor"),
        ("seed: 1\nmodel: x\nseed: 2\n", r"config\.yaml, line 3: seed stands in line 1 already"),
        ("? [a, b]\n: 1\n", r"config\.yaml, line 1: found unhashable key|is not the name of a setting"),
        ("1: 2\n", r"config\.yaml: 1 is not the name of a setting"),
        ("a: 1\n---\nb: 2\n", r"config\.yaml, line 2: but found another document"),
        ("- a\n", r"config\.yaml is not a mapping of settings"),
        ("", r"config\.yaml is not a mapping of settings"),
        ("model: \x1b[2J\n", r"config\.yaml has a value that YAML cannot read"),
        ("x: " + "y" * (1 << 20), r"config\.yaml is larger than 1 MB"),
    ],
)
def test_hostile_yaml_is_refused_quickly_in_one_sentence(reader, path, content, message):
    path.write_text(content)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        reader(path)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"config\.json: Expecting value \(column 1\)"),
        ('{"model":\n [1,,]}', r"config\.json: .*\(line 2, column \d"),
        ("[" * 100_000, r"config\.json: nested too deeply"),
        ('{"model": ' + "[" * 300 + "]" * 300 + "}", r"config\.json: nested more than 100 levels deep"),
        ('{"t": ' + "9" * 5000 + "}", r"config\.json: Exceeds the limit"),
        ("[1]", r"config\.json is not a mapping of settings"),
    ],
)
def test_hostile_json_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "config.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_named(reader, path, encoding):
    path.write_bytes("model: mini\n".encode(encoding))
    with pytest.raises(ValueError, match=r"config\.yaml is in UTF-16 or UTF-32, or no text: save it as UTF-8"):
        reader(path)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "/dev/random"])
def test_devices_are_refused(reader, name):
    with pytest.raises(OSError, match=f"{name} is a device, not a file"):
        # Only a file by this name is taken for settings on a command line.
        read_settings(name) if reader is READERS["train"] else reader(name)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("output_dir: ''\n", "output_dir"),
        ("output_dir: ' '\n", "output_dir"),
        ("train: [rows.jsonl, '']\n", "train"),
        ("corpus: {source: ''}\n", r"corpus\.source"),
        ("teachers: {server: {model: ''}}\n", r"teachers\.server\.model"),
        ("models: [a, '']\n", "models"),
    ],
)
def test_empty_texts_are_refused(reader, path, content, name):
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"config\.yaml: {name} is empty: give a value, or leave it out"):
        reader(path)


def test_an_instruction_may_be_empty(path):
    path.write_text("teachers: {server: {instruction: ''}}\n")
    assert read_settings(path) == {"teachers": {"server": {"instruction": ""}}}
