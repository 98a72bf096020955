"""Serving a reranker, over HTTP and in vLLM."""
