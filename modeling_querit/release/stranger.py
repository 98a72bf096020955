"""Run in a process of its own: what somebody gets from a folder who never heard of this package.

`python -I stranger.py FOLDER PAIRS.json OUT.json`; nothing of the package is imported, nor can it be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["modeling_querit"] = None


def main(folder: str, pairs_file: str, out: str) -> None:
    """Score the pairs by both roads, and write the scores, by their names."""
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoModel

    pairs = [tuple(pair) for pair in json.loads(Path(pairs_file).read_text(encoding="utf-8"))]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    scores = {"AutoModel": model.predict(pairs, show_progress_bar=False).tolist()}
    del model
    settings = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.float32}}
    encoder = CrossEncoder(folder, **settings)
    scores["CrossEncoder"] = encoder.predict(pairs, show_progress_bar=False).tolist()
    Path(out).write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
