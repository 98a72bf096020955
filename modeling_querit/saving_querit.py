"""What a saved folder holds beside weights and config, and whether loading it found every weight."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .configuration_querit import ACTIVATION
from .pipeline_querit import QueritPipeline
from .validation_querit import INDEX_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from .modeling_querit import QueritPreTrainedModel


logger = logging.get_logger(__name__)

_EXPERT_KEY = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FORWARD = {"method": "forward", "method_output_name": "logits"}
# Files for sentence-transformers. Without the "message" entry it would silently not use the chat template.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "sequence-classification",
        "module_output_name": "scores",
        "modality_config": {"text": _FORWARD, "message": _FORWARD | {"format": "flat"}},
    },
    "config_sentence_transformers.json": {
        "model_type": "CrossEncoder",
        "activation_fn": ACTIVATION,
        "prompts": {},
        "default_prompt_name": None,
    },
}

CARD_STUB = """---
library_name: transformers
pipeline_tag: text-ranking
tags:
- reranker
- cross-encoder
- sentence-transformers
- querit
---

# A Querit reranker

Scores in [-1, 1] how well a document meets a query; the method is Querit-Reranker
([arXiv 2606.19037](https://arxiv.org/abs/2606.19037)). Say here what it was trained on, what it was measured on, and
under which licence the backbone and the data allow its use.

"""

# How to use a model, the same for all of them; `{name}` stands for its name.
USAGE = """```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}", trust_remote_code=True)
model.rank("who wrote Faust", ["Goethe finished Faust in 1831.", "A fist is a closed hand."])
```

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
model.rank("who wrote Faust", ["Goethe finished Faust in 1831.", "A fist is a closed hand."])
```

A special token's name inside a query or document (`[CLS]`, say) is plain text for `model.rank`; runtimes that tokenize
by themselves, sentence-transformers and vLLM among them, take it for the token.
"""


def usage(name: str) -> str:
    """Examples of how to use the model of this name."""
    return USAGE.replace("{name}", python_text(name))


def python_text(name: str) -> str:
    """A name as it stands between quotation marks in Python."""
    return json.dumps(name, ensure_ascii=not name.isprintable())[1:-1]


def write_folder_files(model: QueritPreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write code files, tokenizer, files for sentence-transformers, and a card stub if there is no card yet.

    A model without a tokenizer (built from a config, or its folder is gone) is written all the same, with a warning.
    """
    write_code_files(model, folder)
    try:
        processor = model.processor
    except (OSError, ValueError) as error:
        logger.warning(f"{folder} is written without a tokenizer. {error}")
    else:
        processor.save_pretrained(folder)


def write_code_files(model: QueritPreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write all files of `write_folder_files` except the tokenizer."""
    folder = Path(folder)
    # Not type(model): FSDP gives a model a class of torch's, whose file would be copied.
    model_class = next(parent for parent in type(model).__mro__ if parent.__module__.endswith("modeling_querit"))
    for object_class in (model_class, QueritPipeline):
        custom_object_save(object.__new__(object_class), folder)
    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_card_stub(folder, folder.name)


def write_card_stub(folder: str | os.PathLike[str], name: str, over_template: bool = False) -> None:
    """Write the card stub if there is no card.

    Args:
        folder: Folder of the model.
        name: Name of the model in the examples.
        over_template: Whether to replace the blank card that transformers generates, too.
    """
    card = Path(folder) / "README.md"
    if not card.exists() or (over_template and "has been automatically generated" in card.read_text(encoding="utf-8")):
        card.write_text(CARD_STUB + usage(name), encoding="utf-8")


def finish_weights(folder: str | os.PathLike[str]) -> None:
    """Remove weight files of an earlier save, and make those just written readable to whom the umask allows it.

    An earlier `model.safetensors` would be loaded in place of shards beside it, and an earlier index in place of a
    single file. safetensors writes files that only their owner may read.

    Args:
        folder: Folder that was just saved.
    """
    whole, index = Path(folder, WEIGHTS_FILE), Path(folder, INDEX_FILE)
    if whole.exists() and index.exists():
        (whole if index.stat().st_mtime_ns > whole.stat().st_mtime_ns else index).unlink()
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    mode = _file_mode(Path(folder))
    for path in Path(folder).glob("model*.safetensors"):
        if _SHARD_NAME.fullmatch(path.name) and path.name not in shards:
            path.unlink()
        elif path == whole or path.name in shards:
            path.chmod(mode)


def _file_mode(folder: Path) -> int:
    """The mode of new files, which the umask decides; it cannot be read without setting it for all threads."""
    probe = folder / f".{os.getpid()}-{threading.get_ident()}.probe"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


def spare_head(quantization_config: Any) -> Any:
    """Exclude the head from a quantization: its two rows take no time, and decide the score."""
    excluded = getattr(quantization_config, "modules_to_not_convert", None) or []
    if hasattr(quantization_config, "modules_to_not_convert") and "score" not in excluded:
        quantization_config = copy.copy(quantization_config)
        quantization_config.modules_to_not_convert = [*excluded, "score"]
    return quantization_config


def check_loaded(name: str | os.PathLike[str], info: dict[str, Any], may_mismatch: bool) -> None:
    """Check that every weight came from the checkpoint: a freshly initialised head would rank at random.

    Args:
        name: Folder or repository that was loaded.
        info: Loading info of `PreTrainedModel.from_pretrained`.
        may_mismatch: Whether weights of another shape are allowed, and initialised.

    Raises:
        ValueError: if a weight is missing or has another shape.
    """
    if info["mismatched_keys"] and not may_mismatch:
        key, *shapes = sorted(info["mismatched_keys"], key=str)[0]
        raise ValueError(
            f"{name}: {key} has shape {tuple(shapes[0])} in the checkpoint, but this model needs "
            f"{tuple(shapes[1])}; is config.json that of these weights, with a head of two labels?"
        )
    if info["missing_keys"]:
        missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        raise ValueError(
            f"{name}: no weight for {name_few(missing)} in the checkpoint"
            + (f", while it holds {name_few(unused)} that the model has no use for" if unused else "")
            + ". A reranker is not loaded with weights left at their initial value; to start training from a plain "
            "decoder use modeling_querit.from_backbone."
        )


def missing_experts(folder: str | os.PathLike[str]) -> list[str]:
    """Find the keys of single experts that a local checkpoint lacks although it has other experts of their layer."""
    keys: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            keys.update(tensors.keys())
    expert_keys = [match.groups() for match in map(_EXPERT_KEY.fullmatch, keys) if match]
    layers, experts = {layer for layer, _, _ in expert_keys}, {int(expert) for _, expert, _ in expert_keys}
    needed = itertools.product(layers, range(max(experts, default=-1) + 1), {part for _, _, part in expert_keys})
    return sorted({f"{layer}.{expert}.{part}" for layer, expert, part in needed} - keys)


def name_few(keys: list[str], limit: int = 3) -> str:
    """Name the first few of a list of keys, and how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
