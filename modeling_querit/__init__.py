"""Querit rerankers (arXiv 2606.19037): compact multilingual cross-encoders, usable from all common runtimes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_when_imported

if TYPE_CHECKING:
    from .checkpoints.backbone import from_backbone
    from .checkpoints.mini import default_model_path
    from .configuration_querit import QueritConfig
    from .evaluation.evaluate import evaluate
    from .modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking, QueritOutput
    from .pair_encoding_querit import EncodedPair
    from .processing_querit import QueritProcessor
    from .ranking_querit import RankedDocument

# Public names and their modules, which are imported when a name is used: torch and transformers take seconds.
_MODULES = {
    "EncodedPair": "pair_encoding_querit",
    "QueritConfig": "configuration_querit",
    "QueritForSequenceClassification": "modeling_querit",
    "QueritForSequenceRanking": "modeling_querit",
    "QueritOutput": "modeling_querit",
    "QueritProcessor": "processing_querit",
    "RankedDocument": "ranking_querit",
    "default_model_path": "checkpoints.mini",
    "evaluate": "evaluation.evaluate",
    "from_backbone": "checkpoints.backbone",
}

__all__ = [
    "EncodedPair",
    "QueritConfig",
    "QueritForSequenceClassification",
    "QueritForSequenceRanking",
    "QueritOutput",
    "QueritProcessor",
    "RankedDocument",
    "default_model_path",
    "evaluate",
    "from_backbone",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("modeling-querit")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})


# Once this package is imported, transformers' auto classes load its folders without remote code.
register_when_imported()
