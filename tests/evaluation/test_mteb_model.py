"""Our model in mteb, beside mteb's own wrapper of the same folder, on a real reranking task with local data."""

import json
import time

import pytest
from small_collections import with_local_data

from modeling_querit.evaluation.mteb_model import MtebReranker, model_meta, register


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def task(mteb):
    """SciDocsRR, a reranking task of mteb, over a small collection."""
    return with_local_data(mteb.get_task("SciDocsRR"))


def predictions(mteb, model, task, folder):
    """Scores of a model by query and document, the results of mteb, and the seconds it took."""
    start = time.perf_counter()
    results = mteb.evaluate(
        model, task, cache=None, prediction_folder=folder, show_progress_bar=False, co2_tracker=False
    )
    seconds = time.perf_counter() - start
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["default"]["test"], results.task_results[0], seconds


@pytest.mark.slow
def test_scores_are_those_of_mteb_s_own_wrapper(mteb, task, saved_folder, tmp_path):
    from mteb.models.model_implementations.querit_models import QueritWrapper

    wrapper = QueritWrapper(str(saved_folder), device="cpu", batch_size=4)
    wrapper.mteb_model_meta = model_meta(saved_folder)
    ours = model_meta(saved_folder).load_model(device="cpu")
    assert isinstance(ours, MtebReranker)
    expected, their_result, their_seconds = predictions(mteb, wrapper, task, tmp_path / "theirs")
    scores, result, seconds = predictions(mteb, ours, task, tmp_path / "ours")
    assert {query: set(hits) for query, hits in scores.items()} == {
        query: set(hits) for query, hits in expected.items()
    }
    for query, hits in scores.items():
        assert hits == pytest.approx(expected[query], abs=1e-4)
    assert len({score for hits in scores.values() for score in hits.values()}) > 5
    assert result.get_score() == their_result.get_score()
    print(f"mteb's wrapper {their_seconds:.2f} s, this package {seconds:.2f} s: {their_seconds / seconds:.1f}x")


@pytest.mark.slow
def test_mteb_finds_a_registered_folder(mteb, saved_folders):
    from mteb.models.model_implementations import MODEL_REGISTRY

    folder = str(saved_folders("qwen3"))
    meta = register(folder)
    try:
        model = mteb.get_model(folder, device="cpu")
    finally:
        del MODEL_REGISTRY[folder]
    assert (meta.name, model.mteb_model_meta.name) == ("local/qwen3", "local/qwen3")
    assert folder not in json.dumps(meta.to_dict(), default=str)
    assert len(meta.revision) == 32


@pytest.mark.slow
def test_published_checkpoints_keep_their_entry(mteb):
    meta, theirs = model_meta("Querit/Querit-4B"), mteb.get_model_meta("Querit/Querit-4B")
    assert meta.loader is MtebReranker
    assert (meta.name, meta.revision, meta.n_parameters) == (theirs.name, theirs.revision, theirs.n_parameters)
    assert theirs.loader is not MtebReranker


def test_instructions_are_those_of_mteb_s_wrapper(models):
    from datasets import Dataset
    from torch.utils.data import DataLoader

    pairs = [("fox", "a red fox"), ("hen", "a hen"), ("fox", "the owl")]
    instructions = ["Find a novel.", "Find a hen.", "Find a novel."]
    queries, documents = zip(*pairs, strict=True)
    columns = {"instruction": instructions}
    inputs = [DataLoader(Dataset.from_dict({"text": texts} | columns), batch_size=2) for texts in (queries, documents)]
    model = models("qwen3")
    scores = MtebReranker("local/x", model=model).predict(*inputs)
    expected = [
        float(model.predict([pair], instruction=text)[0]) for pair, text in zip(pairs, instructions, strict=True)
    ]
    assert scores == pytest.approx(expected, abs=1e-5)
