"""Memory beyond the weights while documents stream through `predict_stream`, in a process of its own."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import make_documents, words_of
from modeling_querit import QueritForSequenceRanking

QUERY = "what does it take to rank many documents"
# Tokens per document: median, and standard deviation of the logarithm.
MEDIAN, SIGMA = 60, 0.5
# Seconds between two samples of the memory.
INTERVAL = 0.005


class Sampler(threading.Thread):
    """Thread that samples this process's resident memory and records the peak, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until the `with` block ends."""
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, resident())

    def __enter__(self) -> Sampler:
        self.peak = resident()
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self.join()


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_apart(folder: Path, dtype: torch.dtype, counts: Sequence[int], seed: int) -> dict[str, Any]:
    """`measure` in a fresh process, as memory that a process freed but still holds would hide a peak."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, folder, dtype, counts, seed, torch.get_num_threads()).result()


def measure(folder: Path, dtype: torch.dtype, counts: Sequence[int], seed: int, threads: int) -> dict[str, Any]:
    """Measure peaks of memory beyond the weights after each number of documents in `counts`."""
    torch.set_num_threads(threads)
    model = QueritForSequenceRanking.from_pretrained(folder, dtype=dtype)
    documents = make_documents(
        words_of(model.processor.tokenizer), random.Random(seed), max(counts), median=MEDIAN, sigma=SIGMA
    )
    _touch(model)
    gc.collect()
    before = resident()
    peaks: dict[int, float] = {}
    with Sampler() as sampler:
        scores = model.predict_stream(((QUERY, document) for document in documents), show_progress_bar=False)
        for done, _ in enumerate(scores, start=1):
            if done in counts:
                peaks[done] = max(sampler.peak, resident()) - before
    return {
        "folder": folder.name,
        "layers": model.config.get_text_config().num_hidden_layers,
        "tokens_a_document_median": MEDIAN,
        "mib_weights": sum(parameter.nbytes for parameter in model.parameters()) / 2**20,
        "mib_before": before,
        "mib_beyond_weights": [{"documents": count, "peak": peaks[count]} for count in sorted(counts)],
    }


def _touch(model: torch.nn.Module) -> None:
    """Read a value of each page, as weights mapped from a file count as resident only once they are read."""
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.flatten()[::512].sum()
