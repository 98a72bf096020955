"""A program for a fresh process: the scores of a folder where this package is not installed.

`python -I fresh_process.py FOLDER PAIRS.json SCORES.json`; it imports nothing of the package, and cannot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["modeling_querit"] = None  # type: ignore[assignment]


def main(folder: str, pairs_file: str, scores_file: str) -> None:
    """Score pairs by AutoModel and by CrossEncoder, and write both lists of scores by these names.

    Args:
        folder: Folder of the model.
        pairs_file: JSON file of [query, document] pairs.
        scores_file: JSON file to write.
    """
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoModel

    pairs = [tuple(pair) for pair in json.loads(Path(pairs_file).read_text(encoding="utf-8"))]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    scores = {"AutoModel": model.predict(pairs, show_progress_bar=False).tolist()}
    del model
    encoder = CrossEncoder(folder, trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32})
    scores["CrossEncoder"] = encoder.predict(pairs, show_progress_bar=False).tolist()
    Path(scores_file).write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
