"""Evaluation: how well a reranker orders candidates, by relevance judgements (qrels)."""
