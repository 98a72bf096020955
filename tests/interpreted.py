"""The Triton kernels on any machine: on a GPU where there is one, in Triton's interpreter otherwise."""

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SOURCE = Path(__file__).parents[1] / "modeling_querit" / "moe_triton_querit.py"


def load_copy(name):
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def triton_module():
    """The module; where there is no GPU, a copy with kernels to interpret, and everybody else's left alone."""
    if CUDA:
        yield importlib.import_module("modeling_querit.moe_triton_querit")
        return
    tl = pytest.importorskip("triton").language
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # A function is to be compiled or interpreted from where it is defined, and Triton's own are already.
        for module in (tl.standard, tl):
            importlib.reload(module)
        yield load_copy("moe_triton_interpreted")
