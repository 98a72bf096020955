"""Through the command: what it writes, what it refuses, and how it goes on after it was stopped."""

import json
import os
import shutil

import pytest
import tiny
from filelock import FileLock

from modeling_querit import QueritForSequenceRanking
from modeling_querit.reranking import tasks
from modeling_querit.retrieval.runs import read_run

TEXTS = {f"d{number}": text for number, text in enumerate(tiny.STRINGS)}
QUERIES = {f"q{number}": f"who wrote book {number}" for number in range(12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A collection, and a run of 12 queries with the same 6 documents."""
    folder = tmp_path_factory.mktemp("bulk")
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in TEXTS.items())
    )
    (folder / "queries.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in QUERIES.items()))
    lines = [f"{query} Q0 {name} 1 {-int(name[1:])} x\n" for query in QUERIES for name in TEXTS]
    (folder / "run.trec").write_text("".join(lines))
    return folder


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two queries."""
    monkeypatch.setattr(tasks, "PAIRS_PER_BLOCK", 12)


@pytest.fixture
def rerank(querit, folder, saved_folders, tmp_path):
    """The command on the run; options replace its own."""

    def rerank(*flags, **options):
        options = {"run": folder / "run.trec", "collection": folder, "output": tmp_path / "out.trec"} | options
        options = {"model": saved_folders("qwen3")} | options
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        return querit("rerank", *arguments, *flags)

    return rerank


def left(path):
    return sorted(entry.name for entry in path.iterdir())


def test_the_run_is_that_of_rank(rerank, tmp_path, models, small_blocks):
    code, out, err = rerank()
    assert (code, out, err) == (0, f"Wrote {tmp_path / 'out.trec'}: 12 queries, 72 pairs\n", "")
    for query, hits in read_run(tmp_path / "out.trec").items():
        ranked = models("qwen3").rank(QUERIES[query], tiny.STRINGS)
        assert [name for name, _ in hits] == [f"d{document.index}" for document in ranked]
        assert [score for _, score in hits] == pytest.approx([document.score for document in ranked], abs=1e-5)
    assert left(tmp_path) == ["out.trec"]


def test_depth_fusion_and_compression(rerank, tmp_path, models):
    assert rerank(depth=3, fuse=1, fusion="rrf")[0] == 0
    run = read_run(tmp_path / "out.trec")
    assert run.keys() == QUERIES.keys()
    assert {tuple(name for name, _ in hits) for hits in run.values()} == {("d0", "d1", "d2")}
    assert rerank(depth=3, fuse=1, fusion="rrf", output=tmp_path / "out.trec.gz")[0] == 0
    assert read_run(tmp_path / "out.trec.gz") == read_run(tmp_path / "out.trec")


def test_rows_in_rows_out(rerank, tmp_path, models):
    rows = [{"query": text, "documents": tiny.DOCUMENTS, "id": name} for name, text in QUERIES.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rerank(run=tmp_path / "rows.jsonl", collection=None, output=tmp_path / "out.jsonl")[0] == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.pop("scores") for row in written] == [
        pytest.approx(models("qwen3").predict(tiny.pairs(query=text)).tolist(), abs=1e-5) for text in QUERIES.values()
    ]
    assert written == rows


class Stopped(Exception):
    pass


def test_scored_blocks_are_not_scored_again(rerank, tmp_path, small_blocks, monkeypatch):
    """The work stops at any point, by an error that nobody catches; what has been scored before is not scored again."""
    assert rerank()[0] == 0
    expected = (tmp_path / "out.trec").read_bytes()
    scored, predict = [], QueritForSequenceRanking.predict

    def stopping_predict(self, pairs, *args, **kwargs):
        if len(scored) in stops:
            stops.remove(len(scored))
            raise Stopped
        scored.extend(pairs)
        return predict(self, pairs, *args, **kwargs)

    monkeypatch.setattr(QueritForSequenceRanking, "predict", stopping_predict)
    stops = [12, 36, 60]
    for _ in range(3):
        with pytest.raises(Stopped):
            rerank(output=tmp_path / "again.trec")
        assert not (tmp_path / "again.trec").exists()
    assert rerank(output=tmp_path / "again.trec")[0] == 0
    assert (tmp_path / "again.trec").read_bytes() == expected
    assert len(scored) == len(set(scored)) == 72
    assert left(tmp_path) == ["again.trec", "out.trec"]


def stop(*args, **kwargs):
    raise Stopped


@pytest.fixture
def stopped(rerank, tmp_path, monkeypatch):
    """A run that stopped before its first score."""
    with monkeypatch.context() as patch:
        patch.setattr(QueritForSequenceRanking, "predict", stop)
        with pytest.raises(Stopped):
            rerank()
    return tmp_path / "out.trec.parts"


@pytest.mark.parametrize(
    ("options", "name"),
    [({"depth": 2}, "depth"), ({"instruction": "x"}, "instruction"), ({"max_length": 99}, "max-length")],
)
def test_scores_of_other_settings_are_not_taken(rerank, stopped, options, name):
    code, out, err = rerank(**options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"has scores with another {name}" in err
    # What the scores do not depend on may change.
    assert rerank(fuse=0.5)[0] == 0


def test_another_input_or_model_is_noticed(rerank, stopped, folder, tmp_path, saved_folders):
    shutil.copytree(folder, tmp_path / "copy")
    with (tmp_path / "copy" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "new"}\n')
    assert "another collection" in rerank(collection=tmp_path / "copy")[2]
    (tmp_path / "copy" / "run.trec").write_text("q1 Q0 d1 1 1 x\n")
    assert "another run" in rerank(run=tmp_path / "copy" / "run.trec")[2]
    assert "another model" in rerank(model=saved_folders("deepseek_v3"))[2]


def test_two_processes_do_not_write_one_output(rerank, stopped):
    with FileLock(stopped / "scores-00000.jsonl.lock"):
        code, out, err = rerank()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Another process writes" in err
    assert rerank()[0] == 0


def test_a_kill_after_the_last_rename_is_repaired(rerank, tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "kept")
    assert rerank()[0] == 0
    (tmp_path / "kept").rename(stopped)
    before = (tmp_path / "out.trec").read_bytes()
    assert rerank()[0] == 0
    assert (tmp_path / "out.trec").read_bytes() == before
    assert left(tmp_path) == ["out.trec"]


BAD = {
    "unknown document": ({"run": "q1 Q0 d99 1 1 x\n"}, [], "bad.trec, line 1: document d99 has no text in"),
    "unknown query": ({"run": "q99 Q0 d1 1 1 x\n"}, [], "bad.trec, line 1: query q99 has no text in"),
    "no run": ({"run": '{"q1": {"d1": 1}}\n'}, [], "bad.trec, line 1: not 'query Q0 document rank score tag'"),
    "empty run": ({"run": ""}, [], "bad.trec has nothing to rerank"),
    "missing run": ({"run": None}, [], "in/missing.trec"),
    "no collection": ({"collection": None}, [], "give the collection"),
    "missing collection": ({"collection": "nowhere"}, [], "There is no folder nowhere"),
    "missing folder": ({"output": "nowhere/out.trec"}, [], "There is no folder"),
    "output is a folder": ({"output": "."}, [], "is a folder"),
    "no output": ({"output": None}, [], "--run needs --output"),
    "depth": ({"depth": 0}, [], "--depth is 0"),
    "length": ({"max_length": 0}, [], "--max-length is 0"),
    "fuse": ({"fuse": 1.5}, [], "--fuse is 1.5"),
    "fusion": ({"fusion": "sum"}, [], "Invalid value for '--fusion'"),
    "probability": ({"min_probability": 2}, [], "--min-probability is 2"),
    "not calibrated": ({"min_probability": 0.5}, [], "not calibrated"),
    "with a query": ({"query": "fox"}, [], "--query does not go with --run"),
    "with a file": ({}, ["documents.txt"], "FILE does not go with --run"),
    "model": ({"model": "/nowhere"}, [], "/nowhere"),
    "rows with a collection": ({"rows": "{}"}, [], "leave out --collection"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(rerank, tmp_path, monkeypatch, name):
    options, flags, message = BAD[name]
    options = dict(options)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for kind, file in (("run", "bad.trec"), ("rows", "bad.jsonl")):
        if options.get(kind) is not None:
            (tmp_path / "in" / file).write_text(options.pop(kind))
            options["run"] = f"in/{file}"
        elif kind in options:
            options["run"] = "in/missing.trec"
    code, out, err = rerank(*flags, **options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert left(tmp_path) == ["in"]


def test_an_output_that_exists_is_not_replaced(rerank, tmp_path):
    (tmp_path / "out.trec").write_text("precious")
    assert "exists: remove it" in rerank()[2]
    assert (tmp_path / "out.trec").read_text() == "precious"


@pytest.mark.parametrize("option", ["--collection=x", "--output=x", "--depth=1", "--fuse=0", "--skip-broken"])
def test_options_of_runs_need_a_run(querit, option):
    code, _, err = querit("rerank", "--query", "fox", option)
    assert code == 2
    assert "needs --run" in err


def test_a_pipe_is_refused(rerank, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in rerank(run=tmp_path / "pipe")[2]
    assert left(tmp_path) == ["pipe"]


def test_broken_lines_are_set_aside_and_counted(rerank, folder, tmp_path):
    assert rerank()[0] == 0
    lines = (folder / "run.trec").read_text()
    (tmp_path / "broken.trec").write_text(f"nonsense\n{lines}q99 Q0 d1 1 1 x\nq98 Q0 d1 1 1 x\n")
    code, out, err = rerank("--skip-broken", run=tmp_path / "broken.trec", output=tmp_path / "new.trec")
    assert (code, err) == (0, "")
    rejects = tmp_path / "new.trec.rejects.jsonl"
    assert out == f"Wrote {tmp_path / 'new.trec'}: 12 queries, 72 pairs; 3 lines set aside in {rejects}\n"
    assert (tmp_path / "new.trec").read_bytes() == (tmp_path / "out.trec").read_bytes()
    assert len(rejects.read_text().splitlines()) == 3


def test_a_full_disk_leaves_no_output(rerank, tmp_path, folder):
    resource = pytest.importorskip("resource")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        code, out, err = rerank()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "could not be written" in err
    assert not (tmp_path / "out.trec").exists()
    assert rerank()[0] == 0


def test_probable_documents_alone(rerank, querit, tmp_path, saved_folders, models):
    from modeling_querit.training.calibrate import write_calibration

    model = shutil.copytree(saved_folders("qwen3"), tmp_path / "model")
    write_calibration(model, {"method": "platt", "slope": 1.0, "intercept": 0.0})
    ranked = models("qwen3").rank(QUERIES["q0"], tiny.STRINGS)
    minimum = (ranked[2].score + 1) / 2 - 1e-4
    assert rerank(model=model, min_probability=minimum)[0] == 0
    assert len(read_run(tmp_path / "out.trec")["q0"]) == 3
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(text) + "\n" for text in tiny.STRINGS))
    options = ["--model", model, "--json", "--min-probability", minimum]
    _, out, _ = querit("rerank", "--query", QUERIES["q0"], *options, tmp_path / "documents.jsonl")
    shown = json.loads(out)["results"]
    assert [entry["index"] for entry in shown] == [document.index for document in ranked[:3]]
    # The score is still a score.
    assert [entry["score"] for entry in shown] == pytest.approx([document.score for document in ranked[:3]], abs=1e-5)
