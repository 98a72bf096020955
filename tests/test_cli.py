import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from modeling_querit.cli import app

LINES = ["a novel by lee", "who wrote the book is unknown", "x"]


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    return str(path)


def rerank(querit, folder, *argv):
    return querit("rerank", "--query", tiny.QUERY, "--model", str(folder), *argv)


def expected_of(model, documents):
    return [
        {"index": index, "score": pytest.approx(score, abs=1e-5), "document": document}
        for index, score, document in model.rank(tiny.QUERY, documents)
    ]


def test_json_is_best_first(querit, model, saved_folder, documents):
    code, out, _ = rerank(querit, saved_folder, "--json", documents)
    assert code == 0
    assert json.loads(out) == {"model": str(saved_folder), "results": expected_of(model, LINES)}


def test_top_k_limits_the_results(querit, model, saved_folder, documents):
    _, out, _ = rerank(querit, saved_folder, "--json", "--top-k", "1", documents)
    assert json.loads(out)["results"] == expected_of(model, LINES)[:1]


def test_jsonl_rows_are_returned_whole(querit, model, saved_folder, tmp_path):
    rows = [{"_id": "7", "title": "The book", "text": "who wrote it"}, "plain", {"text": "ü"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    _, out, _ = rerank(querit, saved_folder, "--json", str(path))
    results = json.loads(out)["results"]
    assert [result.pop("id", None) for result in results] == [
        "7" if result["document"] == rows[0] else None for result in results
    ]
    assert results == expected_of(model, rows)


@pytest.mark.parametrize("text", ["a novel\nx\n", '{"text": "a novel"}\n{"text": "x"}\n', "\ufeffa novel\r\nx\r\n"])
def test_documents_come_from_standard_input(querit, monkeypatch, saved_folder, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, _ = rerank(querit, saved_folder, "--json")
    documents = [result["document"] for result in json.loads(out)["results"]]
    assert code == 0
    assert sorted(document["text"] if isinstance(document, dict) else document for document in documents) == [
        "a novel",
        "x",
    ]


def test_a_table_shows_brackets_as_they_are(querit, saved_folder, tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("[bold]not markup[/bold]\n[CLS]\n")
    code, out, _ = rerank(querit, saved_folder, str(path))
    assert code == 0
    assert "[bold]not markup[/bold]" in out
    assert "score" in out.splitlines()[1]
    assert "[CLS]" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt"),
        ("empty.txt", b" \n\n", "is empty"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3"),
        ("textless.jsonl", b'{"title": "a"}\n', "line 1: a document is a string or an object with a 'text'"),
        ("latin.txt", "für".encode("latin-1"), "line 1: 'utf-8' codec can't decode byte 0xfc"),
        ("title.jsonl", b'{"text": "a", "title": 5}\n', "line 1: the title is not a string"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", "line 1: "),
    ],
)
def test_bad_documents_give_one_line_and_code_2(querit, saved_folder, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = rerank(querit, saved_folder, str(tmp_path / name))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("querit: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nobody/nothing"])
def test_an_unknown_model_gives_one_line_and_code_2(querit, documents, name):
    code, out, err = rerank(querit, name, documents)
    assert (code, out) == (2, "")
    assert name in err
    assert err.count("\n") == 1


def test_an_unknown_device_is_named(querit, saved_folder, documents):
    code, _, err = rerank(querit, saved_folder, "--device", "nonsense", documents)
    assert code == 2
    assert "--device nonsense" in err
    assert err.count("\n") == 1


def test_a_missing_standard_input_is_named(querit, monkeypatch, saved_folder):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = rerank(querit, saved_folder)
    assert (code, err) == (2, "querit: There is no standard input: name a file.\n")


@pytest.mark.parametrize(
    ("options", "expected"), [([], "a\ufffdb".encode()), (["--json"], b"a\\ud800b")], ids=["table", "json"]
)
def test_a_lone_surrogate_is_replaced_or_escaped(querit, saved_folders, tmp_path, monkeypatch, options, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", write_through=True))
    code, _, _ = querit("rerank", "--query", "\ud800", "--model", saved_folders("qwen3"), path, *options)
    assert code == 0
    assert expected in written.getvalue()


def test_a_damaged_weight_file_is_named(querit, saved_folder, documents, tmp_path):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = rerank(querit, tmp_path / "damaged", documents)
    assert code == 2
    assert "damaged or truncated" in err


@pytest.mark.parametrize("device", ["meta", "privateuseone:0", "cuda:99"])
def test_a_device_without_memory_is_refused(querit, saved_folder, documents, device):
    code, out, err = rerank(querit, saved_folder, "--device", device, documents)
    assert (code, out) == (2, "")
    assert err.startswith(f"querit: --device {device} cannot be used, name cpu or cuda: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["rerank", "--query", "fox", "--device", ""], "--device"),
        (["rerank", "--query", "fox", "--device="], "--device"),
        (["rerank", "--query", " ", "x"], "--query"),
        (["rerank", "--query", "fox", ""], "An argument"),
        (["train", "--train", "x.jsonl", "--output_dir", ""], "--output_dir"),
        (["train", "--output_dir=", "--train", "x.jsonl"], "--output_dir"),
        (["merge", "a", "b", "--output", ""], "--output"),
        (["convert", "", "b"], "An argument"),
        (["release", "a", "--repo-id", ""], "--repo-id"),
    ],
)
def test_an_empty_argument_is_refused(querit, tmp_path, monkeypatch, argv, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = querit(*argv)
    assert (code, out, err) == (2, "", f"querit: {name} is empty: give it a value, or leave it out.\n")
    assert list(tmp_path.iterdir()) == []


def test_an_instruction_may_be_empty(querit, saved_folder, documents):
    assert rerank(querit, saved_folder, "--instruction", "", documents)[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rerank"], "Missing option '--query' / '-q'; see querit rerank --help."),
        (["rerank", "--nope", "x"], "No such option: --nope"),
        (["rerank", "-q", "x", "--top-k", "y" * 5000], "Invalid value for '--top-k'"),
        (["paint\x1b[2J"], "No such command"),
        (["rerank", "-q", "x", "a", "b"], "Got unexpected extra argument"),
        (["train", "--optim", "x" * 5000], "invalid choice"),
        (["train", "--max_steps", "many"], "invalid int value: 'many'"),
        (["train", "--learning_rate"], "expected one argument"),
        (["train", "--train", "x.jsonl", "--report_to", "wandb"], "report_to is 'wandb', which is not installed"),
        (["train", "--train", "x.jsonl", "--report_to", "paper"], "report_to is 'paper': choose none, or from"),
    ],
)
def test_a_wrong_command_line_gives_one_short_line(querit, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modeling_querit.training.arguments.get_available_reporting_integrations", lambda: [])
    code, out, err = querit(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("querit: ")
    assert message in err
    assert err.removesuffix("\n").isprintable()
    assert len(err) < 300
    assert list(tmp_path.iterdir()) == []


def test_top_k_below_one_is_refused(querit, saved_folder, documents):
    code, _, err = rerank(querit, saved_folder, "--top-k", "0", documents)
    assert code == 2
    assert "--top-k is 0" in err


def test_convert_writes_a_folder(querit, model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    code, out, _ = querit("convert", str(source), str(tmp_path / "new"))
    assert (code, out) == (0, f"Wrote {tmp_path / 'new'}\n")
    assert (tmp_path / "new" / "config.json").exists()
    code, out, err = querit("convert", str(source), str(tmp_path / "new"))
    assert (code, out) == (2, "")
    assert "exists: name a new folder" in err


def test_train_names_missing_data(querit, tmp_path):
    code, _, err = querit("train", "--output_dir", str(tmp_path / "out"), "--use_cpu", "True")
    assert code == 2
    assert "nothing to train on" in err


def test_convert_names_its_layouts(querit, saved_folder, tmp_path):
    code, _, err = querit("convert", saved_folder, tmp_path / "new", "--to", "gguf")
    assert code == 2
    assert "'querit', 'published', 'seq-cls'" in err


COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def test_help_lists_the_commands(querit):
    code, out, _ = querit("--help")
    assert code == 0
    assert re.findall(r"^  ([a-z]+)  ", out, re.MULTILINE) == COMMANDS
    assert {"rerank", "train", "adapt", "merge", "convert"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(querit, command):
    code, out, _ = querit(command, "--help")
    assert code == 0
    assert f"Example: querit {command} " in " ".join(out.split())


def test_version(querit):
    assert querit("--version") == (0, f"querit {version('modeling-querit')}\n", "")


def test_shell_completion_can_be_installed(querit):
    _, out, _ = querit("--help")
    assert "--install-completion" in out


def run_process(*arguments, stdout=subprocess.PIPE, program="", python=sys.executable):
    """A fresh process of the command line, after some Python."""
    program = f"{program}; from modeling_querit.cli import main; main()"
    return subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("querit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"querit {version('modeling-querit')}\n"


AT_EXIT = "import atexit, sys; atexit.register(lambda: print(sorted({} & sys.modules.keys()), file=sys.stderr))"


def test_help_imports_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "numpy", "pyarrow", "rich"}
    done = run_process("--help", program=AT_EXIT.format(heavy))
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.slow
def test_rerank_prints_nothing_but_its_result(saved_folders, documents):
    pytest.importorskip("torchao")
    program = AT_EXIT.format({"torch", "torchao.utils"})
    options = ["--model", saved_folders("qwen3"), "--json", documents]
    done = run_process("rerank", "--query", tiny.QUERY, *options, program=program)
    assert (done.returncode, done.stderr) == (0, "['torch']\n")
    assert len(json.loads(done.stdout)["results"]) == len(LINES)


@pytest.mark.slow
def test_torchao_is_imported_for_int8(saved_folders, documents):
    pytest.importorskip("torchao")
    options = ["--model", saved_folders("qwen3"), "--json", "--int8", documents]
    program = AT_EXIT.format({"torchao.utils"})
    done = run_process("rerank", "--query", tiny.QUERY, *options, program=program)
    assert (done.returncode, done.stderr) == (0, "['torchao.utils']\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        done = run_process("--help", stdout=full, program="pass")
    assert done.returncode != 0
    assert "No space left" in done.stderr


# One rule for all commands


def refusing_commands(folder, other, tmp_path):
    (tmp_path / "documents.txt").write_text("a novel\n")
    return {
        "rerank": ["rerank", "--query", "q", tmp_path / "documents.txt", "--model", folder],
        "convert": ["convert", folder, tmp_path / "new"],
        "published": ["convert", folder, tmp_path / "new", "--to", "published"],
        "seq-cls": ["convert", folder, tmp_path / "new", "--to", "seq-cls"],
        "merge": ["merge", folder, other, "--output", tmp_path / "new"],
        "release": ["release", folder, "--repo-id", "me/model", "--dry-run"],
    }


def zero_head(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": torch.zeros(2, 32)}, folder / "model.safetensors", metadata={"format": "pt"})


def equal_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": torch.ones(2, 32)}, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"score.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def garbage_tokenizer(folder):
    (folder / "tokenizer.json").write_bytes(b"\x00\x01")


def empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (zero_head, "was never trained"),
        (equal_rows, "was never trained"),
        (pickled, "pytorch_model.bin may run code"),
        (outside, "not a safetensors file beside it"),
        (garbage_tokenizer, "tokenizer.json: the tokenizer cannot be read"),
        (empty_tokenizer, "tokenizer.json: the tokenizer cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_one_command_refuses_all_refuse(querit, saved_folder, tmp_path, damage, message):
    folder = shutil.copytree(saved_folder, tmp_path / "folder")
    damage(folder)
    for name, argv in refusing_commands(folder, saved_folder, tmp_path).items():
        code, out, err = querit(*argv)
        # A release lists all problems of a folder that loads.
        assert code == (1 if name == "release" and "trained" in message else 2), name
        assert message in err, name
        assert out == "", name
        assert not (tmp_path / "new").exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["rerank", "--help"]])
def test_output_that_nobody_reads_ends_a_command_quietly(arguments):
    assert run_into_closed_pipe(*arguments) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_ranking_that_nobody_reads_ends_quietly(saved_folders, documents, forked_python, options):
    arguments = ["rerank", "--query", tiny.QUERY, "--model", saved_folders("qwen3"), documents, *options]
    assert run_into_closed_pipe(*arguments, python=forked_python) == (141, "")


def run_into_closed_pipe(*arguments, **options):
    """Exit code and standard error of a process whose standard output is closed at the other end."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = run_process(*arguments, stdout=closed, program="pass", **options)
    return done.returncode, done.stderr


def test_endless_input_is_refused(querit, monkeypatch, saved_folder):
    monkeypatch.setattr("modeling_querit.retrieval.collection._MAX_DOCUMENTS", 1000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 2000)))
    code, _, err = rerank(querit, saved_folder)
    message = "querit: standard input has more than 1,000 documents: rerank the top of a first stage.\n"
    assert (code, err) == (2, message)


def test_training_rows_in_utf16_are_refused(querit, saved_folder, tmp_path):
    rows = [{"query": f"q{n}", "documents": ["a", "b"], "labels": [1, 0]} for n in range(10)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode("utf-16"))
    options = ["--model", saved_folder, "--train", tmp_path / "rows.jsonl", "--max_steps", "1", "--use_cpu", "True"]
    code, out, err = querit("train", *options, "--output_dir", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err == f"querit: {tmp_path / 'rows.jsonl'} is in UTF-16 or UTF-32, or no text: save it as UTF-8.\n"
    assert not (tmp_path / "run").exists()
