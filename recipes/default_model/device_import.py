"""Import adapters trained on a GPU machine: `python -m recipes.default_model.device_import --from FOLDER`.

Writes them as a training state of `cross_encoder`, which resumes or exports it with the same folder as `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def main() -> None:
    """Read the adapters and write `state.safetensors`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/cross_encoder_gpu"))
    settings = parser.parse_args()
    about = json.loads((settings.folder / "adapters.json").read_text(encoding="utf-8"))
    files = sorted(settings.folder.glob("adapters.*.bin"), key=lambda path: int(path.name.split(".")[1]))
    bits = np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.int16)
    values = torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
    tensors, start = {}, 0
    for name, shape in about["shapes"].items():
        count = math.prod(shape)
        tensors[name if name.startswith("head.") else f"backbone.{name}"] = values[start : start + count].view(shape)
        start += count
    if start != len(values):
        raise ValueError(f"{settings.folder}: {len(values)} values where the shapes ask for {start}.")
    settings.out.mkdir(parents=True, exist_ok=True)
    state = {"step": about["step"], "seconds": 0.0, "tokens": 0, "queries": 0, "counts": {}}
    temporary = settings.out / "state.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"state": json.dumps(state)})
    os.replace(temporary, settings.out / "state.safetensors")


if __name__ == "__main__":
    main()
