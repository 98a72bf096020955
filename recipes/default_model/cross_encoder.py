"""Train the strong cross-encoder: `python -m recipes.default_model.cross_encoder`.

EmbeddingGemma with adapters on all linear layers and a head of two logits on the last token of the published input
format. The learning rate is constant after a warm-up; `--decay STEPS` anneals it to zero and ends the run. The same
command resumes an interrupted run and reads row files that were added since. `--export FOLDER` writes a Querit folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fast_gemma import PARTS, FastGemma
from .measure import draw_curve, measure, read_lists
from .package import QueritForSequenceRanking, from_backbone, listwise_kl, pointwise_bce
from .rows import SPAN
from .soft_labels import SoftLabels
from .stream import Stream

# Scores p1 - p0 whose magnitude exceeds this count as saturated.
SATURATED = 0.99


class CrossEncoder(nn.Module):
    """The backbone with adapters, and the ranking head.

    Args:
        weights: Folder of EmbeddingGemma.
        rank: Rank of the adapters; 0 trains the full weights of the linear layers.
        alpha: Numerator of the adapters' scale, `alpha / rank`.
        compiled: Flag that compiles the forward pass with `torch.compile`.
        teacher: Training state of another cross-encoder, to initialize from.
        layers: Indices of the layers to keep; all by default.
    """

    def __init__(
        self,
        weights: Path,
        rank: int,
        alpha: float,
        compiled: bool = True,
        teacher: Path | None = None,
        layers: Sequence[int] | None = None,
    ):
        super().__init__()
        reranker = untrained(weights)
        if teacher is not None:
            load_into(teacher, reranker)
        if layers is not None:
            keep_layers(reranker, layers)
        self.processor = reranker.processor
        self.backbone = FastGemma(reranker.model, rank, alpha, compiled)
        self.head = nn.Linear(reranker.model.config.hidden_size, 2)
        with torch.no_grad():
            # Zero unless initialized from a teacher.
            self.head.weight.copy_(reranker.score.weight)
            self.head.bias.copy_(reranker.score.bias)

    def forward(self, query: str, documents: Sequence[dict], max_length: int) -> tuple[Tensor, int]:
        """Logit differences z1 - z0, (documents,), and the number of tokens."""
        pairs = self.processor.encode([query] * len(documents), list(documents), max_length=max_length)
        logits = self.head(self.backbone([pair.input_ids for pair in pairs]))
        return logits[:, 1] - logits[:, 0], sum(len(pair.input_ids) for pair in pairs)


def untrained(weights: Path) -> QueritForSequenceRanking:
    """EmbeddingGemma as a Querit reranker with a zero head; `[CLS]` is initialized from the end-of-sequence token."""
    # The row that the vocabulary grows by is overwritten below; transformers' mean initialization takes half a minute.
    grown = partialmethod(PreTrainedModel.resize_token_embeddings, mean_resizing=False)
    with patch.object(PreTrainedModel, "resize_token_embeddings", grown):
        model = from_backbone(weights)
    with torch.no_grad():
        embeddings = model.model.get_input_embeddings().weight
        embeddings[model.processor.cls_token_id] = embeddings[model.processor.tokenizer.eos_token_id]
    return model


def load_into(state: Path, reranker: QueritForSequenceRanking) -> None:
    """Merge the adapters and the head of a training state into a reranker with all layers."""
    with safe_open(state, "pt") as file, torch.no_grad():
        scale = json.loads(file.metadata()["state"]).get("scale", 1.0)
        for number, layer in enumerate(reranker.model.layers):
            for part in PARTS:
                key = f"backbone.layers.{number}.{part.split('.')[1]}"
                target = layer.get_submodule(part).weight
                target += scale * file.get_tensor(f"{key}.b") @ file.get_tensor(f"{key}.a")
        reranker.score.weight.copy_(file.get_tensor("head.weight"))
        reranker.score.bias.copy_(file.get_tensor("head.bias"))


def keep_layers(reranker: QueritForSequenceRanking, layers: Sequence[int]) -> None:
    """Drop all layers of a reranker but these."""
    backbone = reranker.model
    for config in (backbone.config, reranker.config.text_config):
        config.layer_types = [backbone.layers[number].self_attn.layer_type for number in layers]
        config.num_hidden_layers = len(layers)
    backbone.layers = nn.ModuleList(backbone.layers[number] for number in layers)
    for number, layer in enumerate(backbone.layers):
        layer.layer_idx = layer.self_attn.layer_idx = number


def main() -> None:
    """Train, or export the trained model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=Path, nargs="+", default=[Path("runs/default_model/rows/human")])
    parser.add_argument("--validation", type=Path, default=Path("runs/default_model/validation.jsonl"))
    parser.add_argument("--validation-lists", type=int, default=5, help="lists per source")
    parser.add_argument("--weights", type=Path, default=Path("runs/weights/embeddinggemma-300m/model_download"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/cross_encoder"))
    parser.add_argument("--teacher", type=Path, help="state.safetensors of another run, to initialize from")
    parser.add_argument("--layers", type=int, nargs="+", help="indices of the layers to keep")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters; 0 trains the full weights")
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the adapters")
    parser.add_argument("--head-rate", type=float, default=1e-4, help="learning rate of the head")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--queries", type=int, default=4, help="queries per step")
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--long-length", type=int, default=384)
    parser.add_argument("--long-share", type=float, default=0.1)
    parser.add_argument("--pointwise", type=float, default=0.2, help="weight of the pointwise loss")
    parser.add_argument("--temperature", type=float, default=0.1, help="temperature of soft labels, which span 10 nats")
    parser.add_argument("--hard-temperature", type=float, default=0.2, help="temperature of labels 0 and 1")
    parser.add_argument(
        "--soft-labels",
        type=float,
        metavar="NATS",
        help="use EmbeddingGemma's soft labels, plus NATS for a human label",
    )
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the whole run")
    parser.add_argument(
        "--decay", type=int, default=0, help="steps from now over which the learning rate decays to zero"
    )
    parser.add_argument("--measure-every", type=int, default=100)
    parser.add_argument("--save-seconds", type=float, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    if settings.export:
        export(settings)
    else:
        train(settings)


def train(settings: argparse.Namespace) -> None:
    """Train until `--steps`, or until SIGTERM."""
    model = CrossEncoder(
        settings.weights, settings.rank, settings.alpha, teacher=settings.teacher, layers=settings.layers
    )
    soft_labels = None
    if settings.soft_labels is not None:
        soft_labels = SoftLabels(settings.weights, untrained(settings.weights).model, settings.soft_labels)
    groups = [
        {"params": list(model.backbone.parameters()), "rate": settings.rate},
        {"params": list(model.head.parameters()), "rate": settings.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))
    stream = Stream(settings.data, settings.rows, settings.seed)
    lists = read_lists(settings.validation, settings.data, settings.validation_lists)
    settings.out.mkdir(parents=True, exist_ok=True)
    state = restore(settings.out / "state.safetensors", model, optimizer)
    stream.counts.update(state["counts"])
    state["scale"] = settings.alpha / settings.rank if settings.rank else 1.0
    last = min(settings.steps, state["step"] + settings.decay) if settings.decay else settings.steps
    print(f"{len(stream.names)} sources; step {state['step']}, {state['seconds'] / 3600:.2f} h so far", flush=True)
    forget_after(settings.out / "train.jsonl", state["step"])
    saved = time.monotonic()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    while state["step"] < last and not stopped:
        began = time.monotonic()
        step = state["step"] = state["step"] + 1
        share = min(1.0, step / settings.warmup)
        if settings.decay:
            share *= max(0.0, (last - step) / settings.decay)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share
        rows = stream.step(step, settings.queries)
        max_length = max_length_of(step, settings)
        if soft_labels is not None:
            rows = [with_soft_labels(row, soft_labels, max_length) for row in rows]
        metrics = train_step(model, optimizer, rows, settings, max_length)
        seconds = time.monotonic() - began
        state["seconds"] += seconds
        state["tokens"] += metrics["tokens"]
        state["queries"] += settings.queries
        state["counts"] = stream.counts
        line = {"step": step, **metrics, "seconds": round(seconds, 1), "rate": round(settings.rate * share, 7)}
        append(settings.out / "train.jsonl", line)
        if step % 10 == 0:
            print(
                f"{time.strftime('%H:%M:%S')} step {step}: loss {metrics['loss']:.3f} of {metrics['chance']:.3f}, "
                f"{metrics['tokens'] / seconds:.0f} tokens/s, {state['seconds'] / 3600:.2f} h of training, "
                f"{(last - step) * seconds / 3600:.1f} h left",
                flush=True,
            )
        if step % settings.measure_every == 0 or step == last:
            save(settings.out / "state.safetensors", model, optimizer, state)
            began = time.monotonic()
            result = measure(model, lists, settings.max_length)
            result["took"] = round(time.monotonic() - began)
            counters = {name: state[name] for name in ("step", "queries", "tokens")}
            append(settings.out / "validation.jsonl", counters | {"hours": round(state["seconds"] / 3600, 3)} | result)
            draw_curve(settings.out)
            print(f"validation: {result['mean']}", flush=True)
            saved = time.monotonic()
        elif time.monotonic() - saved > settings.save_seconds:
            save(settings.out / "state.safetensors", model, optimizer, state)
            saved = time.monotonic()
    save(settings.out / "state.safetensors", model, optimizer, state)


def max_length_of(step: int, settings: argparse.Namespace) -> int:
    """Tokens that the pairs of a step are cut to."""
    is_long = random.Random(f"long/{settings.seed}/{step}").random() < settings.long_share
    return settings.long_length if is_long else settings.max_length


def with_soft_labels(row: dict, soft_labels: SoftLabels, max_length: int) -> dict:
    """A row of human labels with the encoder's soft labels beside them."""
    if "teachers" in row:
        return row
    logits = soft_labels(row["query"], row["texts"], torch.tensor(row["labels"]), max_length)
    labels = (1 + (logits - logits.max()) / SPAN).clamp(min=0).tolist()
    return row | {"labels": labels, "relevance": row["labels"], "teachers": ["embeddinggemma"]}


def train_step(
    model: CrossEncoder,
    optimizer: torch.optim.Optimizer,
    rows: list[dict],
    settings: argparse.Namespace,
    max_length: int,
) -> dict:
    """Take one optimizer step and return its metrics."""
    losses, chance_losses, top_hits, saturated, tokens = [], [], [], [], 0
    for row in rows:
        # One query's graph at a time fits in memory without gradient checkpointing.
        scores, count = model(row["query"], row["texts"], max_length)
        labels = torch.tensor(row["labels"])
        ids = torch.zeros(len(labels), dtype=torch.long)
        temperature = settings.temperature if "teachers" in row else settings.hard_temperature
        loss = listwise_kl(scores, labels, ids, temperature)
        if settings.pointwise:
            relevance = torch.tensor(row.get("relevance", row["labels"]))
            loss = loss + settings.pointwise * pointwise_bce(scores, relevance, ids)
        (loss / len(rows)).backward()
        with torch.no_grad():
            zeros = torch.zeros_like(scores)
            losses.append(listwise_kl(scores, labels, ids, temperature).item())
            chance_losses.append(listwise_kl(zeros, labels, ids, temperature).item())
            top_hits.append(float(labels[scores.argmax()] == labels.max()))
            saturated.append((torch.tanh(scores / 2).abs() > SATURATED).float().mean().item())
        tokens += count
    norm = nn.utils.clip_grad_norm_(
        [parameter for group in optimizer.param_groups for parameter in group["params"]], settings.clip
    )
    optimizer.step()
    optimizer.zero_grad()
    model.backbone.merge()
    return {
        "loss": round(sum(losses) / len(losses), 4),
        "chance": round(sum(chance_losses) / len(chance_losses), 4),
        "first": sum(top_hits) / len(top_hits),
        "saturated": round(sum(saturated) / len(saturated), 3),
        "norm": round(float(norm), 3),
        "tokens": tokens,
        "sources": [row["source"] for row in rows],
    }


def save(path: Path, model: CrossEncoder, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write parameters, optimizer moments and counters, atomically."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind in optimizer.state[parameter]:
                tensors[f"{kind}.{name}"] = optimizer.state[parameter][kind]
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    os.replace(temporary, path)


def restore(path: Path, model: CrossEncoder, optimizer: torch.optim.Optimizer | None) -> dict:
    """Load a state written by `save`, if there is one; returns the counters."""
    state = {"step": 0, "seconds": 0.0, "tokens": 0, "queries": 0, "counts": {}}
    if path.exists():
        with safe_open(path, "pt") as file, torch.no_grad():
            state = json.loads(file.metadata()["state"])
            names = set(file.keys())
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(name))
                if optimizer is not None and f"exp_avg.{name}" in names:
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(state["step"])),
                        **{kind: file.get_tensor(f"{kind}.{name}") for kind in ("exp_avg", "exp_avg_sq")},
                    }
        model.backbone.merge()
    return state


def export(settings: argparse.Namespace) -> None:
    """Write the trained model as a Querit folder, bfloat16."""
    model = CrossEncoder(settings.weights, settings.rank, settings.alpha, False, settings.teacher, settings.layers)
    restore(settings.out / "state.safetensors", model, None)
    reranker = untrained(settings.weights)
    if settings.layers is not None:
        keep_layers(reranker, settings.layers)
    model.backbone.write_to(reranker.model)
    with torch.no_grad():
        reranker.score.weight.copy_(model.head.weight)
        reranker.score.bias.copy_(model.head.bias)
    reranker.to(torch.bfloat16).save_pretrained(settings.export)


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after the saved one, as they are run again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)


def append(path: Path, line: dict) -> None:
    """Append a line to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
