"""How the default model is made: embeddings, rows, the cross-encoder. See README.md for the order of the commands."""
