"""First stages: test collections on disk, and the retrievers whose candidates are reranked."""
