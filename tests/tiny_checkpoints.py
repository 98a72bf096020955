"""Tiny checkpoints to merge, and slow reference formulas of merges."""

import shutil
from pathlib import Path

import numpy as np
import tiny
import torch
from safetensors.torch import load_file, save_file

from modeling_querit import QueritForSequenceRanking
from modeling_querit.merging.merge import merge_checkpoints
from modeling_querit.merging.recipe import Recipe

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# mergekit's threshold: two vectors with a cosine beyond it count as parallel.
PARALLEL_COSINE = 0.9995


def change(source, destination, edit):
    """Copy a folder and change its tensors: `edit` maps the tensors by key to the new ones."""
    shutil.copytree(source, destination)
    tensors = edit(load_file(destination / "model.safetensors"))
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def vary(source, destination, seed, dtype=None):
    """Copy a folder and move every tensor at random, most far and some so little that they stay parallel."""

    def move(tensors):
        generator = torch.Generator().manual_seed(seed)
        varied = {}
        for index, (key, tensor) in enumerate(sorted(tensors.items())):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            moved = tensor.float() + noise * (0.001 if index % 5 == 0 else 1)
            wanted_dtype = tensor.dtype if key.endswith("e_score_correction_bias") else dtype or tensor.dtype
            varied[key] = moved.to(wanted_dtype)
        return varied

    return change(source, destination, move)


def make_adapter(folder, model, seed=1, **settings):
    """Save a LoRA adapter with large random updates; return peft's model, not merged yet."""
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
    """Save an adapter for the reranker in a folder, as `make_adapter` does."""
    return make_adapter(folder, QueritForSequenceRanking.from_pretrained(base), **settings)


def whole(tensor):
    """Read all rows of a lazy tensor."""
    return tensor.read(slice(0, tensor.shape[0] if tensor.shape else 1))


def bits(tensor):
    """Bytes of a tensor, for comparisons in which NaN equals itself and 0 differs from -0."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def slow_linear(tensors, weights):
    """Weighted mean in float64."""
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    return sum(weight * np.asarray(tensor, np.float64) for weight, tensor in zip(weights, tensors, strict=True))


def slow_slerp(first, second, t):
    """SLERP by the formula of Shoemake 1985 in float64; linear between parallel vectors."""
    first, second = (np.asarray(vector, np.float64) for vector in (first, second))
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    cosine = np.vdot(first, second) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 1.0
    if abs(cosine) > PARALLEL_COSINE:
        return slow_linear([first, second], [1 - t, t])
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


def slow_karcher(vectors, weights, steps=100):
    """Direction with the least weighted sum of squared angles to the vectors, by gradient descent in float64."""
    units = [np.ravel(vector).astype(np.float64) / np.linalg.norm(vector) for vector in vectors]
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    mean = slow_linear(units, weights)
    for _ in range(steps):
        mean = mean / np.linalg.norm(mean)
        mean = mean + 0.5 * slow_gradient(mean, units, weights)
    return mean / np.linalg.norm(mean)


def slow_gradient(mean, units, weights):
    """Half the negative gradient of the weighted sum of squared angles, at a point on the unit sphere."""
    total = np.zeros_like(mean)
    for unit, weight in zip(units, weights, strict=True):
        cosine = np.clip(mean @ unit, -1, 1)
        tangent = unit - cosine * mean
        if np.linalg.norm(tangent) > 0:
            total += weight * np.arctan2(np.linalg.norm(tangent), cosine) * tangent / np.linalg.norm(tangent)
    return total


def merged(folder, models, **settings):
    return tiny.read_tensors(merge_checkpoints(Recipe(models, **settings), folder))


def tensors_of(folders):
    """Key -> the tensor of each model, in float64 numpy."""
    models = [tiny.read_tensors(Path(folder)) for folder in folders]
    return {key: [tensors[key].double().numpy() for tensors in models] for key in models[0]}


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_allclose(actual[key].double().numpy(), tensor, rtol=rtol, atol=atol, err_msg=key)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype is tensor.dtype, key
        assert bits(actual[key]) == bits(tensor), key


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
