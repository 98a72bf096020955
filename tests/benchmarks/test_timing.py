import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_contenders_take_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.interleaved(functions, 2, check=lambda warm: calls.append(sorted(warm)))
    assert calls == ["a", "b", ["a", "b"], "a", "b", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_above_one_says_that_ours_is_faster():
    row = timing.row("w", "ours", "theirs", {"ours": [1.0, 2.0, 9.0], "theirs": [8.0, 6.0, 5.0]})
    assert (row["ratio"], row["seconds_ours"], row["seconds_against"]) == (3.0, 2.0, 6.0)


def test_shares_of_time_sum_to_one():
    shares = timing.profile_shares(lambda: torch.randn(64, 64) @ torch.randn(64, 64), CPU)
    assert sum(shares.values()) == pytest.approx(1)
    assert "matrix products" in shares
