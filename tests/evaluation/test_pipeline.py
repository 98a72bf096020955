import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from small_collections import make_texts, write_beir
from tiny_checkpoints import vary

from modeling_querit.evaluation.evaluate import evaluate, fused
from modeling_querit.evaluation.pipeline import EvaluationPipeline
from modeling_querit.evaluation.settings import EvaluationSettings
from modeling_querit.retrieval.runs import read_run

ROOT = Path(__file__).parents[2]
# Files that are the same however an evaluation was run.
FILES = ("results.json", "results.png", "evaluation.json", "runs")


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_beir(tmp_path_factory.mktemp("collections") / "animals", *make_texts())


@pytest.fixture(scope="module")
def rerankers(saved_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(saved_folders("qwen3")), str(vary(saved_folders("qwen3"), folder / "law", 1))]


@pytest.fixture(scope="module")
def undisturbed(rerankers, collection, tmp_path_factory):
    """The folder of an evaluation, and its results."""
    folder = tmp_path_factory.mktemp("evaluations") / "undisturbed"
    settings = EvaluationSettings(tuple(rerankers), (str(collection),), depth=8, output=folder)
    return folder, EvaluationPipeline(settings).run()


def content(folder):
    """Names and bytes of the files that must be the same."""
    paths = [path for name in FILES for path in [folder / name, *folder.glob(f"{name}/**/*")] if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


@pytest.mark.slow
def test_results_are_those_of_evaluate(undisturbed, rerankers, collection):
    _, results = undisturbed
    expected = evaluate({"qwen3": rerankers[0], "law": rerankers[1]}, str(collection), depth=8)
    (measured,) = results["collections"]
    summary = expected.summary()
    assert measured["systems"] == summary["systems"]
    assert (measured["queries"], measured["pairs"]) == (summary["queries"], summary["pairs"])
    (difference,) = measured["differences"]
    assert difference["ndcg_at_10"] == pytest.approx(expected.mean("law") - expected.mean("qwen3"))
    assert difference["ndcg_at_10_p_value"] == expected.p_value("law", "qwen3")
    (row,) = results["rows"]
    assert row["first_stage + law"] == pytest.approx(100 * expected.mean(fused("law")))


def test_runs_and_judgements_have_these_values_by_trec_eval_itself(undisturbed):
    folder, results = undisturbed
    lines = [line.split() for line in (folder / "runs/animals_test/qrels.trec").read_text().splitlines()]
    qrels = {}
    for query, _, document, grade in lines:
        qrels.setdefault(query, {})[document] = int(grade)
    run = {query: dict(hits) for query, hits in read_run(folder / "runs/animals_test/law.trec").items()}
    by_trec = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    expected = np.mean([values["ndcg_cut_10"] for values in by_trec.values()])
    assert results["collections"][0]["systems"]["law"]["ndcg_at_10"] == pytest.approx(expected, abs=1e-9)


def test_a_finished_evaluation_is_not_computed_again(undisturbed, rerankers, collection, monkeypatch):
    folder, results = undisturbed
    before = content(folder)
    monkeypatch.setattr("modeling_querit.evaluation.pipeline.load_model", None)
    settings = EvaluationSettings(tuple(rerankers), (str(collection),), depth=8, output=folder, device="cpu")
    assert EvaluationPipeline(settings).run() == results
    assert content(folder) == before


@pytest.mark.slow
def test_embeddings_of_a_killed_evaluation_do_not_stand_in_the_way(undisturbed, rerankers, collection, tmp_path):
    (tmp_path / "out/embeddings/0123").mkdir(parents=True)
    settings = EvaluationSettings(tuple(rerankers), (str(collection),), depth=8, output=tmp_path / "out")
    assert EvaluationPipeline(settings).run() == undisturbed[1]


def test_a_folder_of_another_evaluation_is_refused(undisturbed, rerankers, collection, tmp_path):
    folder, _ = undisturbed
    before = content(folder)
    settings = EvaluationSettings(tuple(rerankers), (str(collection),), depth=9, output=folder)
    with pytest.raises(FileExistsError, match=r"of other settings \(depth\): name another output"):
        EvaluationPipeline(settings).run()
    changed = write_beir(tmp_path / "animals", *make_texts(seed=1))
    settings = EvaluationSettings(tuple(rerankers), (str(changed),), depth=8, output=folder)
    with pytest.raises(FileExistsError, match="name another output"):
        EvaluationPipeline(settings).run()
    assert content(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    settings = EvaluationSettings(tuple(rerankers), (str(collection),), output=tmp_path / "mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        EvaluationPipeline(settings).run()


@pytest.mark.slow
def test_two_processes_that_resume_a_killed_one_write_the_same_files(
    undisturbed, rerankers, collection, forked_python, tmp_path
):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["modeling_querit", "evaluate", *rerankers, "--collection", str(collection), "--depth", "8"]
    arguments += ["-o", str(tmp_path / "out")]
    with subprocess.Popen([forked_python, "-m", *arguments], env=environment, stderr=subprocess.PIPE) as process:
        scores = tmp_path / "out/scores/animals_test"
        while process.poll() is None and not any(path.stat().st_size for path in scores.glob("*/*.jsonl")):
            time.sleep(0.002)
        # As abrupt as SIGKILL.
        process.send_signal(signal.SIGUSR1)
    assert process.returncode == -signal.SIGUSR1, "it ended before it could be killed"
    assert not (tmp_path / "out/results.json").exists()
    launch = [forked_python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m"]
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(undisturbed[0])
    assert done.stdout.count("best_order") == 1


@pytest.mark.slow
def test_a_table_is_printed(querit, rerankers, collection, tmp_path):
    code, out, err = querit(
        "evaluate", rerankers[0], "--collection", collection, "--limit", 5, "--depth", 3, "-o", tmp_path / "out"
    )
    assert code == 0, err
    assert "animals:test (5 queries)" in out
    assert [line.split("  ")[1] for line in out.splitlines()[2:]] == [
        *("random", "first_stage", "qwen3", "first_stage + qwen3", "best_order")
    ]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["settings"]["models"] == ["qwen3"]
    assert f"{100 * results['collections'][0]['systems']['qwen3']['ndcg_at_10']:.2f}" in out
    code, out, _ = querit(
        *("evaluate", rerankers[0], "--collection", collection, "--limit", 5, "--depth", 3, "-o", tmp_path / "out"),
        "--json",
    )
    assert (code, json.loads(out)) == (0, results)


def bad_collections(folder):
    """Collections and options that cannot be evaluated, each with what is said."""
    corpus, texts, qrels = make_texts(documents=8, queries=2)
    write_beir(folder / "unknown", corpus, texts, {"q0": {"nowhere": 1}})
    write_beir(folder / "blank", corpus, {"q0": " ", "q1": "fox"}, {"q0": {"d0": 1}})
    write_beir(folder / "empty", {}, texts, qrels)
    write_beir(folder / "unjudged", corpus, texts, {})
    write_beir(folder / "irrelevant", corpus, texts, {"q0": {"d0": 0}})
    write_beir(folder / "spaced", corpus, texts, {"q0": {"d0": 1, "my document": 0}})
    write_beir(folder / "good", corpus, texts, qrels)
    (folder / "x.run").write_text("this is no run\n")
    (folder / "other.run").write_text("q0 Q0 nowhere 1 0.5 x\n")
    good = ("--collection", folder / "good")
    return [
        (("--collection", folder / "unknown"), "none of the 1 relevant documents, such as 'nowhere'"),
        (("--collection", folder / "blank"), "query 'q0' has no text"),
        (("--collection", folder / "empty"), "has no documents"),
        (("--collection", folder / "unjudged"), "no query has a relevant document"),
        (("--collection", folder / "irrelevant"), "no query has a relevant document"),
        (("--collection", folder / "spaced"), "spaced:test: id 'my document' is empty or has white space"),
        (("--collection", folder / "nowhere"), "is missing"),
        ((*good, "--first-stage", folder / "x.run"), "x.run, line 1: not 'query Q0 document rank score tag'"),
        ((*good, "--first-stage", folder / "other.run"), "ranks document 'nowhere'"),
        ((*good, "--first-stage", "candidates"), "lists no candidates"),
        ((*good, "--first-stage", "./nowhere"), "There is no folder ./nowhere"),
        ((*good, "--depth", 0), "depth is 0"),
        ((*good, "--device", "meta"), "--device meta cannot be used"),
        ((), "Name what to evaluate on"),
    ]


def test_bad_input_is_one_line_and_nothing_is_written(querit, rerankers, tmp_path):
    for options, message in bad_collections(tmp_path / "bad"):
        code, out, err = querit("evaluate", rerankers[0], *options, "-o", tmp_path / "out")
        *progress, last = err.splitlines()
        assert (code, out) == (2, ""), options
        assert message in last, options
        assert all("first stage" in line for line in progress), options
        assert not (tmp_path / "out").exists(), options


def test_nan_leaves_no_results(querit, rerankers, collection, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = vary(Path(rerankers[0]), tmp_path / "broken", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = querit("evaluate", folder, "--collection", collection, "--depth", 2, "-o", tmp_path / "out")
    assert code == 2
    assert "NaN" in err.splitlines()[-1]
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.slow
def test_a_warning_names_documents_that_are_not_there(querit, rerankers, tmp_path):
    corpus, texts, qrels = make_texts(documents=8, queries=2)
    qrels["q0"]["gone"] = 1
    folder = write_beir(tmp_path / "animals", corpus, texts, qrels)
    code, _, err = querit("evaluate", rerankers[0], "--collection", folder, "--depth", 2, "-o", tmp_path / "out")
    assert code == 0
    assert "warning: animals: 1 relevant documents, such as 'gone', are not in the collection" in err
