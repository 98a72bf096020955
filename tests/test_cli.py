import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

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


def test_json_best_first(querit, model, saved_folder, documents):
    code, out, _ = rerank(querit, saved_folder, "--json", documents)
    assert code == 0
    assert json.loads(out) == {"model": str(saved_folder), "results": expected_of(model, LINES)}


def test_top_k(querit, model, saved_folder, documents):
    _, out, _ = rerank(querit, saved_folder, "--json", "--top-k", "1", documents)
    assert json.loads(out)["results"] == expected_of(model, LINES)[:1]


def test_jsonl_keeps_titles_and_whatever_else_a_row_has(querit, model, saved_folder, tmp_path):
    rows = [{"_id": "7", "title": "The book", "text": "who wrote it"}, "plain", {"text": "ü"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    _, out, _ = rerank(querit, saved_folder, "--json", str(path))
    assert json.loads(out)["results"] == expected_of(model, rows)


@pytest.mark.parametrize("text", ["a novel\nx\n", '{"text": "a novel"}\n{"text": "x"}\n', "\ufeffa novel\r\nx\r\n"])
def test_standard_input(querit, monkeypatch, saved_folder, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, _ = rerank(querit, saved_folder, "--json")
    found = [each["document"] for each in json.loads(out)["results"]]
    assert code == 0
    assert sorted(each["text"] if isinstance(each, dict) else each for each in found) == ["a novel", "x"]


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
        ("latin.txt", "für".encode("latin-1"), "is not UTF-8"),
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


def test_an_unknown_device(querit, saved_folder, documents):
    code, _, err = rerank(querit, saved_folder, "--device", "nonsense", documents)
    assert code == 2
    assert "--device nonsense" in err
    assert err.count("\n") == 1


def test_no_standard_input(querit, monkeypatch, saved_folder):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = rerank(querit, saved_folder)
    assert (code, err) == (2, "querit: There is no standard input: name a file.\n")


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_what_cannot_be_written_is_escaped(querit, saved_folders, tmp_path, monkeypatch, more):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", write_through=True))
    code, _, _ = querit("rerank", "--query", "ü", "--model", saved_folders("qwen3"), path, *more)
    assert code == 0
    assert b"\\ud800" in written.getvalue()


def test_a_damaged_weight_file(querit, saved_folder, documents, tmp_path):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = rerank(querit, tmp_path / "damaged", documents)
    assert code == 2
    assert "damaged or cut short" in err


def test_top_k_below_one(querit, saved_folder, documents):
    code, _, err = rerank(querit, saved_folder, "--top-k", "0", documents)
    assert code == 2
    assert "--top-k is 0" in err


def test_convert(querit, model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    code, out, _ = querit("convert", str(source), str(tmp_path / "new"))
    assert (code, out) == (0, f"Wrote {tmp_path / 'new'}\n")
    assert (tmp_path / "new" / "config.json").exists()
    code, out, err = querit("convert", str(source), str(tmp_path / "new"))
    assert (code, out) == (2, "")
    assert "exists: name a new folder" in err


def test_train_names_what_is_missing(querit, tmp_path):
    code, _, err = querit("train", "--output_dir", str(tmp_path / "out"), "--use_cpu", "True")
    assert code == 2
    assert "nothing to train on" in err


def test_the_console_script_is_installed():
    done = subprocess.run(
        [Path(sys.executable).with_name("querit"), "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in ("rerank", "train", "convert"))


def run_in_a_process(program, stdout=subprocess.PIPE):
    program = f"import sys; sys.argv = ['querit', '--help']; {program}; from modeling_querit.cli import run; run()"
    return subprocess.run(
        [sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


def test_a_process_ends_with_all_said_and_without_taking_the_interpreter_down():
    # What is left to be collected by the interpreter says so.
    class_ = "type('Left', (), {'__del__': lambda self: print('collected')})"
    done = run_in_a_process(f"import atexit; atexit.register(print, 'at exit'); left = {class_}()")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage")
    assert done.stdout.endswith("at exit\n")


def test_what_threads_are_at_is_done_before_a_process_ends(tmp_path):
    work = f"(time.sleep(0.5), pathlib.Path({str(tmp_path / 'done')!r}).touch())"
    done = run_in_a_process(
        "import pathlib, time; from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(1); "
        f"pool.submit(lambda: {work})"
    )
    assert done.returncode == 0
    assert (tmp_path / "done").exists()


def test_a_profiler_may_write_what_it_found(tmp_path):
    profile = tmp_path / "profile"
    command = [sys.executable, "-m", "cProfile", "-o", str(profile), "-m", "modeling_querit", "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert profile.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_could_not_be_printed_is_no_success():
    with open("/dev/full", "w") as full:
        done = run_in_a_process("pass", stdout=full)
    assert done.returncode != 0
    assert "No space left" in done.stderr
