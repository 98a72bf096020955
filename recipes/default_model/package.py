"""All imports from `modeling_querit`, so that a renamed module is changed in one place."""

from modeling_querit.adaptation.extractive import ExtractiveGenerator, without_copy
from modeling_querit.adaptation.prompts import QueryRequest
from modeling_querit.checkpoints.backbone import from_backbone
from modeling_querit.mixed_precision_querit import fastest_dtypes
from modeling_querit.modeling_querit import QueritForSequenceRanking
from modeling_querit.pair_encoding_querit import DEFAULT_INSTRUCTION
from modeling_querit.processing_querit import QueritProcessor
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.training.losses import listwise_kl, margin_mse, pointwise_bce

__all__ = [
    "DEFAULT_INSTRUCTION",
    "BM25",
    "ExtractiveGenerator",
    "QueritForSequenceRanking",
    "QueritProcessor",
    "QueryRequest",
    "fastest_dtypes",
    "from_backbone",
    "listwise_kl",
    "margin_mse",
    "pointwise_bce",
    "without_copy",
]
