"""Checkpoints in and out: plain decoders, published layouts, the model that ships with the package."""
