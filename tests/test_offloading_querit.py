"""Models whose weights accelerate loads while they compute."""

import copy
import os
import threading

import accelerate
import pytest
import tiny
import torch

from modeling_querit import QueritForSequenceRanking


def offload_to_disk(model, folder, saved_folder):
    return accelerate.disk_offload(copy.deepcopy(model), folder, execution_device=torch.device("cpu"))


def offload_to_memory(model, folder, saved_folder):
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))


def load_from_disk(model, folder, saved_folder):
    return QueritForSequenceRanking.from_pretrained(saved_folder, device_map={"": "disk"}, offload_folder=folder)


def load_partly_from_disk(model, folder, saved_folder):
    on_disk = ("model.layers.0", "model.norm", "score")
    on_cpu = ("model.embed_tokens", "model.layers.1", "model.rotary_emb")
    device_map = dict.fromkeys(on_disk, "disk") | dict.fromkeys(on_cpu, "cpu")
    return QueritForSequenceRanking.from_pretrained(saved_folder, device_map=device_map, offload_folder=folder)


@pytest.mark.parametrize("offload", [offload_to_disk, offload_to_memory, load_from_disk, load_partly_from_disk])
@pytest.mark.parametrize("training", [True, False])
def test_offloaded_weights_rank_alike(model, scores, saved_folder, tmp_path, offload, training):
    offloaded = offload(model, tmp_path, saved_folder)
    offloaded.processor = model.processor
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    offloaded.train(training)
    assert offloaded.predict(tiny.pairs()).tolist() == pytest.approx(scores, abs=1e-5)
    [best, *_] = offloaded.rank(tiny.QUERY, tiny.DOCUMENTS, batch_tokens=64)
    assert best.score == pytest.approx(max(scores), abs=1e-5)


def test_several_threads_rank_with_offloaded_weights(models):
    model = models("qwen3")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    offloaded.processor = model.processor
    expected, results = model.predict(tiny.pairs()).tolist(), []
    threads = [
        threading.Thread(target=lambda: results.extend(offloaded.predict(tiny.pairs()).tolist() for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [pytest.approx(expected, abs=1e-5)] * 20
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if offloaded.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_weights_that_are_nowhere_are_named(models):
    model = copy.deepcopy(models("qwen3")).to("meta")
    model.processor = models("qwen3").processor
    with pytest.raises(ValueError, match="meta device"):
        model.rank(tiny.QUERY, tiny.DOCUMENTS)
