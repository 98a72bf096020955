"""Training runs of a few steps on tiny models."""

from transformers import TrainerCallback

from modeling_querit.training.arguments import QueritTrainingArguments, settings_from_mapping
from modeling_querit.training.data import RankingDataset
from modeling_querit.training.trainer import QueritTrainer

ROWS = [
    {"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}", "nothing"], "labels": [1, 0, 0]}
    for n in range(8)
]
# Lists of different lengths with graded labels, one of them without anything to compare.
UNEVEN = [
    {
        "query": f"number {n}",
        "documents": [f"it is {'very ' * (n * k % 7)}{n + k}" for k in range(1 + n % 4)],
        "labels": [(k * 0.37 + n * 0.11) % 1 for k in range(1 + n % 4)],
    }
    for n in range(8)
]
# Settings of every run here: short, quiet, on the CPU.
QUICK = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
}


class Gradients(TrainerCallback):
    """Collects the gradients of each optimizer step, by name of the parameter."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def make_settings(output_dir, **settings):
    """Settings of `querit train`, as a YAML file would give them."""
    return settings_from_mapping({"output_dir": str(output_dir)} | QUICK | settings, "the test")


def as_flags(output_dir, **settings):
    """The same settings as a command line, without lists and mappings."""
    mapping = {"output_dir": str(output_dir)} | QUICK | settings
    return [str(part) for name, value in mapping.items() for part in (f"--{name}", value)]


def make_args(output_dir, **settings):
    """Training arguments of a trainer made by hand."""
    defaults = QUICK | {"logging_steps": 10, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
    return QueritTrainingArguments(**({"output_dir": str(output_dir)} | defaults | settings))


def make_trainer(model, output_dir, rows=ROWS, callbacks=None, trainer=QueritTrainer, eval_dataset=None, **settings):
    args = make_args(output_dir, **settings)
    return trainer(model, args, train_dataset=RankingDataset(rows), eval_dataset=eval_dataset, callbacks=callbacks)
