import numpy as np
import pytest
import torch

from modeling_querit.arguments_querit import check_count, describe


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_counts_of_any_library_become_ints(value):
    count = check_count("top_k", value)
    assert (count, type(count)) == (3, int)


def test_no_count_is_none():
    assert check_count("top_k", None) is None


@pytest.mark.parametrize("value", [3.0, "3", True, [3]])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(TypeError, match=r"top_k is .*: give an integer of at least 1"):
        check_count("top_k", value)


@pytest.mark.parametrize("value", [0, -1])
def test_a_count_is_at_least_one(value):
    with pytest.raises(ValueError, match=f"top_k is {value}: give an integer of at least 1"):
        check_count("top_k", value)


def test_a_description_is_short():
    assert describe(["a"]) == "list ['a']"
    assert len(describe("x" * 1000)) < 80
