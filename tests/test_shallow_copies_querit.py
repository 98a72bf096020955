"""Shallow copies of modules share their weights, and nothing else."""

import pytest
import torch
from torch import nn

from modeling_querit.shallow_copies_querit import copy_submodules, evaluation_copy


@pytest.fixture
def module():
    shared = nn.Linear(4, 4)
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList([nn.Sequential(shared, nn.Dropout(0.9)), nn.Sequential(shared, nn.BatchNorm1d(4))]),
            "head": nn.Linear(4, 2),
        }
    )


def test_a_model_in_evaluation_mode_is_not_copied(module):
    assert evaluation_copy(module.eval()) is module


def test_all_modules_of_the_copy_are_in_evaluation_mode(module):
    copied = evaluation_copy(module)
    assert not any(part.training for part in copied.modules())
    assert all(part.training for part in module.modules())
    assert [*copied.state_dict()] == [*module.state_dict()]
    assert all(ours is theirs for ours, theirs in zip(copied.parameters(), module.parameters(), strict=True))
    # A module that has two names is one in the copy, too.
    assert copied["layers"][0][0] is copied["layers"][1][0] is not module["layers"][0][0]


def test_what_the_copy_gets_does_not_reach_the_module(module):
    copied = evaluation_copy(module)
    copied["head"].register_forward_hook(lambda *_: torch.zeros(1))
    copied["head"].register_buffer("mask", torch.ones(1))
    copied.add_module("other", nn.Identity())
    states = torch.ones(1, 4)
    assert torch.equal(copied["head"](states), torch.zeros(1))
    assert module["head"](states).shape == (1, 2)
    assert "other" not in module
    assert not hasattr(module["head"], "mask")


def test_only_the_way_to_submodules_is_copied(module):
    copied, [head, last] = copy_submodules(module, ["head", "layers.1.0"])
    assert copied["head"] is head is not module["head"]
    assert copied["layers"][1][0] is last is not module["layers"][1][0]
    assert copied["layers"][0] is module["layers"][0]
    assert copied["layers"][1][1] is module["layers"][1][1]
