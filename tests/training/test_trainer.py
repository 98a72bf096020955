import copy
import math

import pytest
import torch
from small_runs import ROWS, UNEVEN, Gradients, make_args, make_trainer
from tiny import make_model

from modeling_querit.training.data import RankingDataset
from modeling_querit.training.trainer import QueritTrainer


def gradients(model, output_dir, rows=UNEVEN, **settings):
    """Gradients of one optimizer step over all rows, by name of the parameter."""
    callback = Gradients()
    settings = {"max_steps": 1, "max_grad_norm": 0, "per_device_train_batch_size": len(rows)} | settings
    make_trainer(copy.deepcopy(model), output_dir, rows, callbacks=[callback], **settings).train()
    return callback.steps[0]


def assert_close(first, second, **tolerances):
    assert first.keys() == second.keys()
    tolerances = {"atol": 2e-6, "rtol": 1e-4} | tolerances
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, msg=name, **tolerances)


def test_the_loss_is_the_models_own(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    batch = trainer.data_collator(ROWS[:3])
    expected = model(**batch).loss
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert outputs.score.shape == (9, 1)


def test_losses_add_up(model, tmp_path):
    batch = make_trainer(model, tmp_path).data_collator(ROWS[:3])
    names = ["pairwise_hinge", "listwise_kl", "pointwise_bce"]
    losses = [make_trainer(model, tmp_path, losses=[name]).compute_loss(model, batch).item() for name in names]
    assert make_trainer(model, tmp_path, losses=names).compute_loss(model, batch).item() == pytest.approx(sum(losses))


@pytest.mark.slow
def test_training_lowers_the_loss(model, tmp_path):
    student = copy.deepcopy(model)
    trainer = make_trainer(
        student, tmp_path, max_steps=12, learning_rate=3e-3, losses=["listwise_kl"], per_device_train_batch_size=8
    )
    batch = trainer.data_collator(ROWS)
    before = trainer.compute_loss(student, batch).item()
    trainer.train()
    student.eval()
    assert trainer.compute_loss(student, batch).item() < 0.6 * before


LOSS_NAMES = ["pairwise_hinge", "margin_mse", "listwise_kl", "ranknet", "pointwise_bce"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_no_gradient(model, tmp_path, accumulation):
    """Lists of different lengths: a mean of the batches' means would be another loss."""
    whole = gradients(model, tmp_path, losses=LOSS_NAMES)
    parts = gradients(
        model,
        tmp_path,
        losses=LOSS_NAMES,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert_close(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_packing_changes_no_gradient(model, tmp_path, settings):
    padded = gradients(model, tmp_path, packing=False, losses=LOSS_NAMES)
    packed = gradients(model, tmp_path, losses=LOSS_NAMES, **settings)
    assert_close(padded, packed)
    assert any(gradient.abs().max() > 1e-4 for gradient in packed.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_packing_changes_no_gradient_of_other_backbones(name, processor, tmp_path):
    backbone = make_model(name, processor, **({"sliding_window": 16} if name == "gemma3_text" else {}))
    padded = gradients(backbone, tmp_path, packing=False)
    assert_close(padded, gradients(backbone, tmp_path, gradient_checkpointing=True))


def test_packed_batches_hold_the_shared_prefix_of_a_query_once(model, tmp_path):
    packed = make_trainer(model, tmp_path).data_collator(ROWS)
    padded = make_trainer(model, tmp_path, packing=False).data_collator(ROWS)
    assert packed["input_ids"].shape[0] == 1
    assert packed["input_ids"].numel() < 0.7 * padded["attention_mask"].sum()
    assert torch.equal(packed["labels"], padded["labels"])
    model.eval()
    with torch.no_grad():
        scores = [
            model(**{name: value for name, value in batch.items() if name not in ("labels", "query_ids")}).score
            for batch in (packed, padded)
        ]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_backbone_that_cannot_be_packed_is_padded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model.model), "_supports_attention_backend", False)
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    assert not trainer.data_collator.packing
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_packing_changes_no_gradient_of_adapters(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["o_proj", "down_proj"], modules_to_save=["score"])
    gradients_by_packing = []
    for packing in (True, False):
        torch.manual_seed(0)
        callback = Gradients()
        adapted = get_peft_model(copy.deepcopy(model), config)
        make_trainer(adapted, tmp_path, UNEVEN, [callback], max_steps=1, max_grad_norm=0, packing=packing).train()
        gradients_by_packing.append(callback.steps[0])
    assert any("lora" in name for name in gradients_by_packing[0])
    assert any("score" in name for name in gradients_by_packing[0])
    assert_close(*gradients_by_packing)


def test_bfloat16_needs_no_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = make_args(tmp_path, bf16=True, use_cpu=False)
    assert args.bf16
    assert args.device.type == "cpu"


@pytest.mark.slow
def test_bfloat16_learns_too(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path, bf16=True, logging_steps=1)
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


@pytest.mark.slow
def test_logs_have_the_weighted_losses_and_the_spread_of_scores(model, tmp_path):
    names = ["pairwise_hinge", "listwise_kl"]
    trainer = make_trainer(
        copy.deepcopy(model),
        tmp_path,
        UNEVEN,
        max_steps=4,
        logging_steps=2,
        losses=names,
        loss_weights=[1, 0.5],
        learning_rate=0,
    )
    trainer.train()
    log = trainer.state.log_history[1]
    assert log["loss"] == pytest.approx(log["loss_pairwise_hinge"] + 0.5 * log["loss_listwise_kl"], abs=1e-4)
    # At learning rate 0, every step sees the same scores of all rows.
    scores = [model.predict([(row["query"], document) for document in row["documents"]]) for row in UNEVEN]
    spreads = [query_scores.std(correction=0).item() for query_scores in scores]
    assert log["score_spread"] == pytest.approx(sum(spreads) / len(spreads), abs=1e-5)
    assert log["score_saturated"] == pytest.approx((torch.cat(scores).abs() > 0.99).float().mean().item())


def test_validation_measures_each_collection_and_their_mean(model, tmp_path):
    collections = {"first": RankingDataset(ROWS), "second": RankingDataset(UNEVEN)}
    trainer = make_trainer(model, tmp_path, eval_dataset=collections, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    for name, rows in (("first", ROWS), ("second", UNEVEN)):
        expected = [slow_ndcg(model, row) for row in rows if max(row["labels"]) > 0]
        assert metrics[f"eval_{name}_ndcg_at_10"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert 0 < metrics[f"eval_{name}_mrr_at_10"] <= 1
    mean = (metrics["eval_first_ndcg_at_10"] + metrics["eval_second_ndcg_at_10"]) / 2
    assert metrics["eval_ndcg_at_10"] == pytest.approx(mean)


def slow_ndcg(model, row):
    scores = model.predict([(row["query"], document) for document in row["documents"]]).tolist()
    order = sorted(range(len(scores)), key=lambda index: -scores[index])

    def dcg(labels):
        return sum(label / math.log2(index + 2) for index, label in enumerate(labels))

    return dcg([row["labels"][index] for index in order]) / dcg(sorted(row["labels"], reverse=True))


@pytest.mark.slow
def test_the_best_checkpoint_is_chosen_by_ndcg(model, tmp_path):
    trainer = make_trainer(
        copy.deepcopy(model),
        tmp_path,
        eval_dataset={"a": RankingDataset(ROWS)},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="ndcg_at_10",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.train()
    values = [log["eval_ndcg_at_10"] for log in trainer.state.log_history if "eval_ndcg_at_10" in log]
    assert trainer.state.best_metric == max(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": ["hinge"]}, "'hinge' is not a loss"),
        ({"losses": []}, "no loss"),
        ({"loss_weights": [1.0, 2.0]}, "2 loss_weights for 1 losses"),
        ({"emphasis": 1.5}, "emphasis is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_losses_and_their_settings_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


def test_the_head_has_a_learning_rate_of_its_own(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path, head_learning_rate=1e-5, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    named = dict(trainer.model.named_parameters())
    assert rates[id(named["score.weight"])] == (1e-5, 0.1)
    assert rates[id(named["score.bias"])] == (1e-5, 0.0)
    assert rates[id(named["model.embed_tokens.weight"])][0] == 1e-3
    assert len(rates) == len(named)


def test_a_saved_model_is_a_folder_for_every_runtime(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "modules.json", "modeling_querit.py"} <= names


@pytest.mark.slow
def test_all_tensors_of_the_best_checkpoint_are_restored(model, tmp_path):
    """Experts too, which the Trainer's own way of loading would skip."""
    trainer = make_trainer(
        copy.deepcopy(model), tmp_path, max_steps=1, learning_rate=1e-2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trained = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_queries_of_similar_length_are_batched_together(model, tmp_path):
    rows = [{"query": "q", "documents": ["x" * n], "labels": [1]} for n in range(1, 101)]
    trainer = make_trainer(
        model, tmp_path, rows, train_sampling_strategy="group_by_length", per_device_train_batch_size=4
    )
    sampler = trainer._get_train_sampler()
    first = list(sampler)
    assert sorted(first) == list(range(100))
    spans = [max(batch) - min(batch) for batch in (first[start : start + 4] for start in range(0, 100, 4))]
    # Of four drawn at random, half would be further apart than 60.
    assert sorted(spans)[12] < 25
    assert list(sampler) == first
    trainer.state.epoch = 1.0
    assert list(sampler) != first


@pytest.mark.slow
def test_tables_are_batched_by_length_too(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    args = make_args(tmp_path, train_sampling_strategy="group_by_length", max_steps=1)
    trainer = QueritTrainer(copy.deepcopy(model), args, train_dataset=datasets.Dataset.from_list(ROWS))
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.slow
def test_a_resumed_run_logs_the_same_losses(model, tmp_path):
    settings = {
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "losses": ["pairwise_hinge", "listwise_kl"],
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "group_by_length",
    }
    logs = []
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(copy.deepcopy(model), tmp_path, UNEVEN, **settings)
        trainer.train(resume_from_checkpoint=resumed)
        logs.append([log for log in trainer.state.log_history if "loss" in log and log["step"] > 2])
    for once, again in zip(*logs, strict=True):
        assert {"loss_pairwise_hinge", "loss_listwise_kl", "score_spread"} <= once.keys()
        assert again == pytest.approx(once, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("losses", [["ranknet"], ["pairwise_hinge", "pointwise_bce"]], ids="+".join)
def test_the_loss_of_a_validation_is_a_mean_over_the_collection(model, tmp_path, losses):
    rows = [*UNEVEN, {"query": "alike", "documents": ["a", "b"], "labels": [1, 1]}]
    losses_by_batch_size = []
    for batch_size in (1, 3, len(rows)):
        trainer = make_trainer(model, tmp_path, rows, losses=losses, per_device_eval_batch_size=batch_size)
        losses_by_batch_size.append(trainer.evaluate(RankingDataset(rows))["eval_loss"])
    with torch.no_grad():
        whole = trainer.compute_loss(model, trainer.data_collator(rows)).item()
    assert losses_by_batch_size == pytest.approx([whole] * 3, abs=1e-5)


def test_a_missing_checkpoint_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such checkpoint: .*checkpoint-7"):
        make_trainer(copy.deepcopy(model), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
