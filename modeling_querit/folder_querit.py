"""What a saved folder holds beside weights and config, so that every runtime loads it as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .configuration_querit import ACTIVATION

if TYPE_CHECKING:
    from .modeling_querit import QueritPreTrainedModel

logger = logging.get_logger(__name__)

_FORWARD = {"method": "forward", "method_output_name": "logits"}
# What sentence-transformers reads. Without the "message" entry it would not use the chat template, silently.
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

# How a model is used, the same for all: `{name}` stands for its own.
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


def write_folder_files(model: QueritPreTrainedModel, folder: str | os.PathLike) -> None:
    """Write code files, tokenizer, the sentence-transformers files, and a card stub where there is no card yet.

    A model without a tokenizer (built from a config, or its folder gone) is written all the same, with a warning.
    """
    write_code_files(model, folder)
    try:
        processor = model.processor
    except (OSError, ValueError) as error:
        logger.warning(f"{folder} is written without a tokenizer. {error}")
    else:
        processor.save_pretrained(folder)


def write_code_files(model: QueritPreTrainedModel, folder: str | os.PathLike) -> None:
    """Write all of `write_folder_files` but the tokenizer."""
    folder = Path(folder)
    # Not of the model itself: FSDP gives it a class of torch's, whose file would be copied.
    ours = next(each for each in type(model).__mro__ if each.__module__.endswith("modeling_querit"))
    custom_object_save(ours.__new__(ours), folder)
    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_card_stub(folder, folder.name)


def write_card_stub(folder: str | os.PathLike, name: str, over_template: bool = False) -> None:
    """Write the card stub where there is no card, or with `over_template` only transformers' own blank one."""
    card = Path(folder) / "README.md"
    if not card.exists() or (over_template and "has been automatically generated" in card.read_text(encoding="utf-8")):
        card.write_text(CARD_STUB + USAGE.replace("{name}", name), encoding="utf-8")
