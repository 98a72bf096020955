"""Other software that ranks with a Querit folder: sentence-transformers, mteb's published wrapper, vLLM."""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from benchmarks import timing
from benchmarks.workloads import Task
from modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking

PEERS = {
    "cross_encoder": "sentence-transformers' CrossEncoder with the faster of transformers' experts implementations",
    "cross_encoder_querit_experts": "the same with our experts, which the folder's code provides",
    "cross_encoder_float32": "the same with float32 weights, for dense models",
    "mteb": "mteb's QueritWrapper, which pads every pair to 4,095 tokens",
}
# Default batch size of sentence-transformers.
BATCH_SIZE = 32


class Peer(NamedTuple):
    """One way to score a task.

    Args:
        run: Function that scores the first `pairs` pairs, in their order.
        pairs: Number of pairs that are scored.
        remarks: Remarks for the row.
    """

    run: Callable[[], list[float]]
    pairs: int
    remarks: str = ""


def experts_of(model: QueritForSequenceRanking) -> str | None:
    """Return the experts implementation that a model uses, or None for a dense model."""
    config = model.config.get_text_config()
    has_experts = any(parameter.dim() == 3 for parameter in model.model.parameters())
    return config._experts_implementation if has_experts else None


def with_experts(model: QueritForSequenceRanking, name: str | None, function: Callable[[], Any]) -> Callable[[], Any]:
    """Make a function that first sets the model's experts implementation."""

    def run() -> Any:
        if name is not None:
            model.set_experts_implementation(name)
        return function()

    return run


def shared_cross_encoder(folder: Path, model: QueritForSequenceRanking) -> Any:
    """Load a folder as a CrossEncoder with default settings, on weights that are already in memory."""
    from sentence_transformers import CrossEncoder

    # A shallow copy shares the modules; the classifier differs from the ranking model in its output alone.
    classifier = copy.copy(model)
    classifier.__class__ = QueritForSequenceClassification
    with patch.object(AutoModelForSequenceClassification, "from_pretrained", return_value=classifier):
        return CrossEncoder(str(folder), trust_remote_code=True, device=str(model.device))


def make_peers(
    names: list[str], folder: Path, model: QueritForSequenceRanking, task: Task, mteb: int
) -> dict[str, Peer]:
    """Make the peers that apply to a model; `mteb` is the number of documents that mteb's wrapper is timed on."""
    if not names:
        return {}
    ours = experts_of(model)
    encoder = shared_cross_encoder(folder, model)
    theirs = faster_experts(model, encoder, task) if ours is not None else None
    remarks = f"experts: {theirs}" if theirs else ""
    predict = _predict(encoder, task)
    peers = {"cross_encoder": Peer(with_experts(model, theirs, predict), len(task.pairs), remarks)}
    if ours is not None:
        peers["cross_encoder_querit_experts"] = Peer(with_experts(model, ours, predict), len(task.pairs))
    elif "cross_encoder_float32" in names and model.dtype != torch.float32:
        peers["cross_encoder_float32"] = Peer(_predict(_float32_cross_encoder(folder, model), task), len(task.pairs))
    if "mteb" in names:
        peers["mteb"] = _mteb(folder, model, task, theirs, min(mteb, len(task.pairs)))
    return {name: peer for name, peer in peers.items() if name in names}


def faster_experts(model: QueritForSequenceRanking, encoder: Any, task: Task) -> str:
    """Find the faster one of transformers' own experts implementations, on one batch of the task."""
    predict = _predict(encoder, task, BATCH_SIZE)
    functions = {name: with_experts(model, name, predict) for name in ("eager", "grouped_mm")}
    seconds = timing.medians(timing.interleaved(functions, rounds=1))
    return min(seconds, key=seconds.__getitem__)


def _predict(encoder: Any, task: Task, pairs: int | None = None) -> Callable[[], list[float]]:
    selected_pairs = task.pairs[:pairs]
    return lambda: encoder.predict(selected_pairs, batch_size=BATCH_SIZE, show_progress_bar=False).tolist()


def _float32_cross_encoder(folder: Path, model: QueritForSequenceRanking) -> Any:
    from sentence_transformers import CrossEncoder

    kwargs = {"dtype": torch.float32}
    return CrossEncoder(str(folder), trust_remote_code=True, device=str(model.device), model_kwargs=kwargs)


def _mteb(folder: Path, model: QueritForSequenceRanking, task: Task, experts: str | None, pairs: int) -> Peer:
    from datasets import Dataset
    from mteb.models.model_implementations.querit_models import QueritWrapper
    from torch.utils.data import DataLoader

    with patch.object(AutoModel, "from_pretrained", return_value=model):
        wrapper = QueritWrapper(str(folder), fp_options=str(model.dtype).removeprefix("torch."))

    def loader(texts: list[str]) -> DataLoader:
        return DataLoader(Dataset.from_dict({"text": texts}), batch_size=pairs)

    def predict() -> list[float]:
        inputs = loader([task.query] * pairs), loader(task.documents[:pairs])
        return wrapper.predict(*inputs, task_metadata=None, hf_split="test", hf_subset="default")

    remarks = f"timed on {pairs} of {len(task.pairs)} pairs and scaled: each is padded to 4,095 tokens"
    if experts:
        remarks += f"; experts: {experts}"
    return Peer(with_experts(model, experts, predict), pairs, remarks)


def vllm(python: Path, folder: Path, task: Task, dtype: str, rounds: int) -> dict[str, Any]:
    """Run vLLM, which another environment has, in its own process; returns its seconds and scores."""
    request = {
        "folder": str(folder),
        "query": task.query,
        "documents": task.documents,
        "dtype": dtype,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as temporary:
        call = Path(temporary)
        (call / "request.json").write_text(json.dumps(request | {"result": str(call / "result.json")}))
        script = Path(__file__).with_name("vllm_peer.py")
        subprocess.run([str(python), str(script), str(call / "request.json")], check=True)
        return json.loads((call / "result.json").read_text())
