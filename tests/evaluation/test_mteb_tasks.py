import json
import subprocess
from pathlib import Path
from statistics import mean

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from small_collections import make_texts, with_local_data, write_rows

from modeling_querit.evaluation.evaluate import evaluate, score_candidates
from modeling_querit.evaluation.mteb_tasks import Benchmark, find_tasks, leaf_tasks, measure_tasks, sources_of
from modeling_querit.files import read_json
from modeling_querit.retrieval.runs import read_run

ROOT = Path(__file__).parents[2]
# mteb takes seconds to import.
pytestmark = pytest.mark.slow


def names(tasks):
    return [task.metadata.name for task in tasks]


def test_tasks_are_found_by_name_and_benchmark():
    assert names(find_tasks(["SciFact"], [])) == ["SciFact"]
    multilingual = Benchmark("MTEB(Multilingual, v2)", ("Reranking",))
    assert set(names(find_tasks([], [multilingual]))) >= {"AlloprofReranking", "RuBQReranking", "T2Reranking"}
    beir = find_tasks(["SciFact"], [Benchmark("BEIR")])
    assert len(beir) == 15
    (cqa,) = (task for task in beir if task.metadata.name == "CQADupstackRetrieval")
    assert len(leaf_tasks(cqa)) == 12
    (german,) = find_tasks(["MIRACLRetrieval"], [], ["deu"])
    assert [source.name for source in sources_of(german)] == ["MIRACLRetrieval:de"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["SciFakt"], []), "mteb: 'SciFakt' not found. Did you mean: 'SciFact'"),
        (([], [Benchmark("BEER")]), "mteb: 'BEER' not found. Did you mean: BEIR"),
        ((["STS12"], []), "STS12 is a task of type STS: name one that ranks"),
        (([], [Benchmark("BEIR", ("Reranking",))]), "BEIR has no ranking task of type Reranking"),
    ],
)
def test_unknown_tasks_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        find_tasks(*arguments)


def test_a_task_is_a_collection_and_mteb_measures_its_run(saved_folders, tmp_path):
    import mteb

    task = with_local_data(mteb.get_task("SciDocsRR"))
    (source,) = sources_of(task)
    collection = source.load()
    assert source.name == collection.name == "SciDocsRR"
    corpus, texts, qrels = make_texts(12, 3)
    assert collection.documents["d0"] == {"title": "Title d0", "text": corpus["d0"]}
    assert (collection.queries, collection.qrels) == (texts, qrels)
    assert collection.candidates == {query: list(grades) for query, grades in qrels.items()}

    folder = str(saved_folders("qwen3"))
    result = evaluate(folder, collection)
    scores = score_candidates(folder, collection, result.candidates)
    run = {query: list(zip(result.candidates[query], of_query, strict=True)) for query, of_query in scores.items()}
    main_scores = measure_tasks(folder, [task], {source.key: run}, tmp_path)
    (path,) = (tmp_path / "results").glob("*/*/SciDocsRR.json")
    (measured,) = read_json(path)["scores"]["test"]
    assert measured["main_score"] == pytest.approx(main_scores["SciDocsRR"], abs=1e-5)
    answerable = [query for query, grades in qrels.items() if max(grades.values()) > 0]
    assert len(answerable) == 3
    assert measured["ndcg_at_10"] == pytest.approx(result.mean("qwen3"), abs=1e-4)


def card(configs):
    """Card of a dataset whose configs are splits and files."""
    entries = [
        {"config_name": name, "data_files": [{"split": split, "path": path}]} for name, (split, path) in configs.items()
    ]
    return f"---\nconfigs: {json.dumps(entries)}\n---\n"


def dataset_files(folder, prefix, split, with_candidates, query_split="queries", corpus_split="corpus"):
    """A dataset in the layout that mteb's datasets have on the Hub; returns its configs."""
    corpus, texts, qrels = make_texts(documents=10, queries=4)
    qrels["q0"] = dict.fromkeys(qrels["q0"], 0)
    write_rows(
        folder / f"{prefix}corpus.jsonl", ({"_id": name, "title": "T", "text": text} for name, text in corpus.items())
    )
    write_rows(folder / f"{prefix}queries.jsonl", ({"_id": name, "text": text} for name, text in texts.items()))
    rows = (
        {"query-id": query, "corpus-id": document, "score": grade}
        for query, grades in qrels.items()
        for document, grade in grades.items()
    )
    write_rows(folder / f"{prefix}qrels/{split}.jsonl", rows)
    configs = {
        f"{prefix}corpus": (corpus_split, f"{prefix}corpus.jsonl"),
        f"{prefix}queries": (query_split, f"{prefix}queries.jsonl"),
        (f"{prefix}qrels" if prefix or with_candidates else "default"): (split, f"{prefix}qrels/{split}.jsonl"),
    }
    if with_candidates:
        rows = ({"query-id": query, "corpus-ids": list(grades)} for query, grades in qrels.items())
        write_rows(folder / f"{prefix}top_ranked.jsonl", rows)
        configs[f"{prefix}top_ranked"] = (split, f"{prefix}top_ranked.jsonl")
    return configs


@pytest.fixture
def hub(online, tmp_path, saved_folders):
    """A Hub with both checkpoints (tiny ones), and small datasets of BEIR, MIRACL and MTEB in their layouts."""
    import mteb

    with HubServer({"hf_good": "mteb", "hf_querit": "Querit"}) as server:
        api = HfApi(endpoint=server.url, token="hf_good")
        for name, prefixes, split, has_candidates in (
            ("SciFact", [""], "test", False),
            ("MIRACLRetrieval", ["en-", "ru-"], "dev", False),
            ("RuBQReranking", [""], "test", True),
        ):
            folder = tmp_path / "datasets" / name
            configs = {}
            for prefix in prefixes:
                configs |= dataset_files(folder, prefix, split, has_candidates)
            (folder / "README.md").write_text(card(configs))
            dataset = mteb.get_task(name).metadata.dataset
            api.create_repo(dataset["path"], repo_type="dataset")
            api.upload_folder(repo_id=dataset["path"], folder_path=folder, repo_type="dataset")
            # The revision that mteb asks for.
            api.create_branch(dataset["path"], branch=dataset["revision"], repo_type="dataset")
        publisher = HfApi(endpoint=server.url, token="hf_querit")
        for name, architecture in (("Querit", "deepseek_v3"), ("Querit-4B", "qwen3")):
            publisher.create_repo(f"Querit/{name}")
            publisher.upload_folder(repo_id=f"Querit/{name}", folder_path=saved_folders(architecture))
        yield server


def test_the_paper_s_protocol_from_a_hub(hub, forked_python, tmp_path):
    """Everything of examples/evaluate_paper.yaml but its size and its encoder, which only the real Hub has."""
    text = (ROOT / "examples/evaluate_paper.yaml").read_text()
    settings = text.replace("Qwen/Qwen3-Embedding-0.6B", "bm25").replace("depth: 100", "depth: 5")
    settings = settings[: settings.index("benchmarks:")] + "tasks: [SciFact, MIRACLRetrieval, RuBQReranking]\n"
    (tmp_path / "paper.yaml").write_text(settings + "languages: [eng, rus]\n")
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [forked_python, "-m", "modeling_querit", "evaluate", "--config", "paper.yaml", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "out/results.json")
    assert [row["collection"] for row in results["rows"]] == [
        "SciFact",
        "MIRACLRetrieval:en",
        "MIRACLRetrieval:ru",
        "RuBQReranking",
    ]
    assert results["mteb_main_scores"].keys() == {"SciFact", "MIRACLRetrieval", "RuBQReranking"}
    for task, scores in results["mteb_main_scores"].items():
        assert scores.keys() == {"Querit/Querit", "Querit/Querit-4B"}
        for model, score in scores.items():
            (path,) = (tmp_path / "out/mteb/results").glob(f"{model.replace('/', '__')}/*/{task}.json")
            assert len(path.parent.name) == 40, "the revision of mteb's registry"
            measured = next(iter(read_json(path)["scores"].values()))
            assert mean([subset["main_score"] for subset in measured]) == pytest.approx(score, abs=1e-5)
    # mteb counts the query without a relevant document as 0, which leaves it out of our means.
    collection = results["collections"][0]
    assert collection["queries"] == 3
    (path,) = (tmp_path / "out/mteb/results").glob("Querit__Querit/*/SciFact.json")
    (measured,) = read_json(path)["scores"]["test"]
    assert measured["ndcg_at_10"] == pytest.approx(
        collection["systems"]["Querit/Querit"]["ndcg_at_10"] * 3 / 4, abs=1e-4
    )
    assert read_run(tmp_path / "out/runs/RuBQReranking/Querit_Querit.trec").keys() == {"q0", "q1", "q2", "q3"}


def test_an_unknown_task_is_one_line(querit, saved_folders, tmp_path):
    code, out, err = querit("evaluate", saved_folders("qwen3"), "--task", "SciFakt", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["querit: mteb: 'SciFakt' not found. Did you mean: 'SciFact'?"]
    assert not (tmp_path / "out").exists()
