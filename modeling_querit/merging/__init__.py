"""Merging: several rerankers become one, tensor by tensor (stage 3 of the paper)."""
