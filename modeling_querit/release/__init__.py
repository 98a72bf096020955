"""Releasing a reranker: checks of its folder, reference scores, publication on the Hub."""
