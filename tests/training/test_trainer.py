import copy

import pytest
import torch
from transformers import TrainerCallback

from modeling_querit.training.data import RankingCollator, RankingDataset
from modeling_querit.training.trainer import QueritTrainer, QueritTrainingArguments

ROWS = [
    {"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}", "nothing"], "labels": [1, 0, 0]}
    for n in range(8)
]


def make_trainer(model, tmp_path, rows=ROWS, **settings):
    settings = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    args = QueritTrainingArguments(**settings)
    return QueritTrainer(
        model, args, train_dataset=RankingDataset(rows), data_collator=RankingCollator(model.processor)
    )


class Gradients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_the_loss_is_the_models_own(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    batch = trainer.data_collator(ROWS[:3])
    expected = model(**batch).loss
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert outputs.score.shape == (9, 1)


def test_losses_add_up(model, tmp_path):
    batch = RankingCollator(model.processor)(ROWS[:3])
    names = ["pairwise_hinge", "listwise_kl", "pointwise_bce"]
    each = [make_trainer(model, tmp_path, losses=[name]).compute_loss(model, batch).item() for name in names]
    assert make_trainer(model, tmp_path, losses=names).compute_loss(model, batch).item() == pytest.approx(sum(each))


def test_it_learns(model, tmp_path):
    student = copy.deepcopy(model)
    trainer = make_trainer(
        student, tmp_path, max_steps=12, learning_rate=3e-3, losses=["listwise_kl"], per_device_train_batch_size=8
    )
    batch = trainer.data_collator(ROWS)
    before = trainer.compute_loss(student, batch).item()
    trainer.train()
    student.eval()
    assert trainer.compute_loss(student, batch).item() < 0.6 * before


def test_accumulation_divides_the_loss(model, tmp_path):
    """One step of 1 x 4 and of 4 x 1 queries: the same gradient, since every query has as many pairs."""
    gradients = []
    for batch, accumulation in ((4, 1), (1, 4)):
        callback = Gradients()
        trainer = make_trainer(
            copy.deepcopy(model),
            tmp_path,
            max_steps=1,
            max_grad_norm=0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer.add_callback(callback)
        trainer.train()
        gradients.append(callback.seen[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


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


@pytest.mark.parametrize("losses", [[], ["hinge"]])
def test_unknown_losses_are_refused(tmp_path, losses):
    with pytest.raises(ValueError, match="choose from listwise_kl, pairwise_hinge, pointwise_bce"):
        QueritTrainingArguments(output_dir=str(tmp_path), losses=losses)


def test_what_it_saves_is_a_whole_folder(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "modules.json", "modeling_querit.py"} <= names


def test_the_best_checkpoint_comes_back_whole(model, tmp_path):
    """All its tensors, experts too, which the Trainer's own way of loading would leave as they are."""
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
