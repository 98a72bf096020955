import csv

import pytest

from modeling_querit.evaluation.evaluate import evaluate, fused
from modeling_querit.evaluation.evaluator import RerankingEvaluator
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.retrieval.collection import Collection

DOCUMENTS = {
    name: {"title": "", "text": text}
    for name, text in {"a": "fox fox fox", "b": "fox hen", "c": "hen", "d": "cow"}.items()
}
COLLECTION = Collection("animals", DOCUMENTS, {"q1": "fox", "q2": "hen"}, {"q1": {"b": 1}, "q2": {"b": 2, "c": 1}})


@pytest.mark.slow
def test_a_cross_encoder_is_measured_as_evaluate_measures_it_and_training_calls_it(saved_folders, tmp_path):
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = CrossEncoder(str(saved_folders("qwen3")), trust_remote_code=True, device="cpu")
    evaluator = RerankingEvaluator(COLLECTION, depth=3)
    metrics = evaluator(model, str(tmp_path), epoch=1, steps=2)
    expected = evaluate({"m": model}, COLLECTION, depth=3)
    assert metrics["animals_ndcg_at_10"] == expected.mean("m")
    assert metrics["animals_mrr_at_10"] == expected.mean("m", "mrr_at_10")
    assert metrics["animals_fused_ndcg_at_10"] == expected.mean(fused("m"))
    assert metrics["animals_first_stage_ndcg_at_10"] == expected.mean("first_stage")
    assert evaluator.primary_metric == "animals_ndcg_at_10"
    with (tmp_path / "reranking_animals_results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["epoch"], row["steps"], float(row["ndcg_at_10"])) == ("1", "2", expected.mean("m"))

    rows = Dataset.from_dict({"query": ["fox"] * 4, "document": ["hen", "fox"] * 2, "label": [0.0, 1.0] * 2})
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), max_steps=2, eval_strategy="steps", eval_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    loss = BinaryCrossEntropyLoss(model)
    trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=loss, evaluator=evaluator)
    trainer.train()
    logged = [log["eval_animals_ndcg_at_10"] for log in trainer.state.log_history if "eval_animals_ndcg_at_10" in log]
    assert len(logged) == 2
    assert logged[-1] == evaluator(model)["animals_ndcg_at_10"]


def test_our_own_model_is_measured_too(models):
    model = models("qwen3")
    metrics = RerankingEvaluator(COLLECTION, first_stage=BM25(DOCUMENTS), depth=3, name="")(model)
    assert metrics["ndcg_at_10"] == evaluate(model, COLLECTION, depth=3).mean("model")


def test_a_collection_that_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no query has a relevant document"):
        RerankingEvaluator(Collection("animals", DOCUMENTS, {"q1": "fox"}, {"q1": {"b": 0}}))
