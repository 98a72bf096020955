"""Rerankers as components of retrieval frameworks."""
