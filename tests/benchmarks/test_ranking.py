import pytest
from benchmark_results import check_results

from benchmarks import ranking


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny_moe", "tiny_dense"])
def test_ranking_is_timed_against_peers_and_ablations(shape, parent, tmp_path):
    pytest.importorskip("sentence_transformers")
    path = tmp_path / "ranking.json"
    names = ["cross_encoder", "cross_encoder_querit_experts", "cross_encoder_float32"]
    arguments = ["--shape", shape, "--workload", "tiny", "--peers", *names, "--rounds", "1", "--ablation", "--profile"]
    ranking.main([*arguments, "--folder", str(parent), "--json", str(path)])
    results = check_results(path)
    rows = results["rows"]
    special = "cross_encoder_querit_experts" if shape == "tiny_moe" else "cross_encoder_float32"
    assert {row["against"] for row in rows} >= {
        *("cross_encoder", special, "bound of matrix products"),
        *("without packing", "without share_prefix", "without prune_last_layer", "without mixed_precision"),
    }
    for row in rows:
        assert row.keys() >= {"layers", "pairs", "tokens", "tokens_shared", "pairs_per_second_ours"}
        assert row.get("max_score_difference", 0) < 0.05
    assert sum(results["more"][shape]["profile"]["tiny"].values()) == pytest.approx(1)
