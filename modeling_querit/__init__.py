"""Querit rerankers: compact multilingual cross-encoders, for every runtime their users live in (arXiv 2606.19037)."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .checkpoints.backbone import from_backbone
from .checkpoints.mini import default_model_path
from .configuration_querit import QueritConfig
from .modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking, QueritOutput
from .processing_querit import EncodedPair, QueritProcessor
from .ranking_querit import RankedDocument

__version__ = "0.1.0.dev0"

__all__ = [
    "EncodedPair",
    "QueritConfig",
    "QueritForSequenceClassification",
    "QueritForSequenceRanking",
    "QueritOutput",
    "QueritProcessor",
    "RankedDocument",
    "default_model_path",
    "from_backbone",
]

# Once this package is imported, the auto classes know its folders without remote code.
AutoConfig.register(QueritConfig.model_type, QueritConfig, exist_ok=True)
AutoModel.register(QueritConfig, QueritForSequenceRanking, exist_ok=True)
AutoModelForSequenceClassification.register(QueritConfig, QueritForSequenceClassification, exist_ok=True)
