import pytest
import torch
from benchmark_results import check_results

from benchmarks import experts


def test_experts_are_timed_against_dense_and_other_implementations(tmp_path):
    path = tmp_path / "experts.json"
    arguments = ["--shape", "tiny_moe", "--tokens", "16", "96", "--rounds", "1", "--backward", "--json", str(path)]
    experts.main(arguments)
    rows = check_results(path)["rows"]
    assert {row["workload"] for row in rows} == {
        f"{tokens} tokens, forward{more}" for tokens in (16, 96) for more in ("", " and backward")
    }
    against = [row["against"] for row in rows if row["workload"] == "16 tokens, forward"]
    own = ["eager", "grouped_mm", "batched_mm"]
    bound = "bound of matrix products"
    assert against == ["dense", "dense, float32", *own, "best of transformers", bound]
    assert "batched_mm" not in [row["against"] for row in rows if row["tokens"] == 96]
    assert all(row["gflops_per_second_ours"] > 0 for row in rows)


def test_experts_are_checked_against_float64(capsys):
    experts.main(["--shape", "tiny_moe", "--check-only"])
    assert "down_proj" in capsys.readouterr().out


def test_wrong_experts_are_not_timed(monkeypatch):
    monkeypatch.setattr(experts, "TOLERANCES", {torch.float32: 0.0})
    with pytest.raises(SystemExit, match="nothing was timed"):
        experts.main(["--shape", "tiny_moe", "--check-only"])
