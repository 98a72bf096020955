"""Reranking in bulk: runs of thousands of queries, streamed, resumed after a kill, on any number of processes."""
