"""Checkpoints: opening any layout, converting between layouts, new rerankers from plain decoders, the mini."""
