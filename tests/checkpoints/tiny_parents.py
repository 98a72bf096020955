"""Tiny models to be merged, and slow formulas to compare merges with."""

import shutil
from pathlib import Path

import numpy as np
import tiny
import torch
from safetensors.torch import load_file, save_file

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints.merge import Recipe, merge_checkpoints

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Beyond this cosine the plane of two vectors is not told; mergekit's number.
PARALLEL = 0.9995


def change(source, destination, of_tensors):
    """A copy of a folder, with other tensors: `of_tensors` makes them of those by key."""
    shutil.copytree(source, destination)
    tensors = of_tensors(load_file(destination / "model.safetensors"))
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def vary(source, destination, seed, dtype=None):
    """A copy of a folder with every tensor moved at random, some far and some so little that they stay parallel."""

    def moved(tensors):
        generator = torch.Generator().manual_seed(seed)
        varied = {}
        for place, (key, tensor) in enumerate(sorted(tensors.items())):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            new = tensor.float() + noise * (0.001 if place % 5 == 0 else 1)
            wanted = tensor.dtype if key.endswith("e_score_correction_bias") else dtype or tensor.dtype
            varied[key] = new.to(wanted)
        return varied

    return change(source, destination, moved)


def make_adapter(folder, model, seed=1, **settings):
    """Save a LoRA adapter of random, large updates; the model that peft makes of it, not merged yet."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR_LAYERS, "modules_to_save": ["score"]} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted


def adapt(folder, base, **settings):
    """`make_adapter` for the reranker in a folder."""
    return make_adapter(folder, QueritForSequenceRanking.from_pretrained(base), **settings)


def whole(tensor):
    """All rows of a tensor that is read row by row."""
    return tensor.read(slice(0, tensor.shape[0] if tensor.shape else 1))


def bits(tensor):
    """The bytes of a tensor, by which NaN equals itself and 0 is not -0."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def slow_linear(tensors, weights):
    """The weighted mean in float64."""
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    return sum(weight * np.asarray(tensor, np.float64) for weight, tensor in zip(weights, tensors, strict=True))


def slow_slerp(first, second, t):
    """SLERP (Shoemake 1985) as it stands in the paper, in float64, linear between parallel vectors."""
    first, second = (np.asarray(each, np.float64) for each in (first, second))
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    cosine = np.vdot(first, second) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return slow_linear([first, second], [1 - t, t])
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


def slow_karcher(vectors, weights, steps=100):
    """The direction with the least weighted sum of squared angles to those of vectors: plain descent, in float64."""
    units = [np.ravel(each).astype(np.float64) / np.linalg.norm(each) for each in vectors]
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    mean = slow_linear(units, weights)
    for _ in range(steps):
        mean = mean / np.linalg.norm(mean)
        mean = mean + 0.5 * slow_gradient(mean, units, weights)
    return mean / np.linalg.norm(mean)


def slow_gradient(mean, units, weights):
    """Half the steepest descent, at a point of the unit sphere, of the weighted sum of squared angles."""
    total = np.zeros_like(mean)
    for unit, weight in zip(units, weights, strict=True):
        cosine = np.clip(mean @ unit, -1, 1)
        away = unit - cosine * mean
        if np.linalg.norm(away) > 0:
            total += weight * np.arctan2(np.linalg.norm(away), cosine) * away / np.linalg.norm(away)
    return total


def merged(folder, models, **settings):
    return tiny.read_tensors(merge_checkpoints(Recipe(models, **settings), folder))


def tensors_of(folders):
    """Key -> the tensor of each model, in float64 numpy."""
    read = [tiny.read_tensors(Path(folder)) for folder in folders]
    return {key: [each[key].double().numpy() for each in read] for key in read[0]}


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_allclose(found[key].double().numpy(), tensor, rtol=rtol, atol=atol, err_msg=key)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype, key
        assert bits(found[key]) == bits(tensor), key


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
