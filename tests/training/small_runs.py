"""Training runs of a few steps on tiny models."""

from transformers import TrainerCallback

from modeling_querit.training.arguments import QueritTrainingArguments
from modeling_querit.training.dataset import RankingDataset
from modeling_querit.training.trainer import QueritTrainer

ROWS = [
    {"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}", "nothing"], "labels": [1, 0, 0]}
    for n in range(8)
]
# Lists of different lengths, with graded labels, one of them without anything to compare.
UNEVEN = [
    {
        "query": f"number {n}",
        "documents": [f"it is {'very ' * (n * k % 7)}{n + k}" for k in range(1 + n % 4)],
        "labels": [(k * 0.37 + n * 0.11) % 1 for k in range(1 + n % 4)],
    }
    for n in range(8)
]


class Gradients(TrainerCallback):
    """The gradients of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def make_args(output_dir, **settings):
    settings = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    return QueritTrainingArguments(**settings)


def make_trainer(model, output_dir, rows=ROWS, callbacks=None, trainer=QueritTrainer, eval_dataset=None, **settings):
    args = make_args(output_dir, **settings)
    return trainer(model, args, train_dataset=RankingDataset(rows), eval_dataset=eval_dataset, callbacks=callbacks)
