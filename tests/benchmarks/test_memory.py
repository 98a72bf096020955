import pytest
import torch

from benchmarks import memory
from benchmarks.shapes import build_folder


@pytest.mark.slow
def test_memory_beyond_the_weights_is_measured(parent):
    folder = build_folder("tiny_dense", 1, torch.float32, parent, seed=0)
    peaks = memory.measure(folder, torch.float32, [10, 300], seed=0, threads=1)["mib_beyond_weights"]
    assert [peak["documents"] for peak in peaks] == [10, 300]
    first, last = (peak["peak"] for peak in peaks)
    assert 0 <= first <= last
