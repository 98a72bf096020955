from modeling_querit.training.plots import draw_run

HISTORY = [
    {"step": 1, "loss": 1.0, "grad_norm": 2.0, "expert_load_max": 1.5, "expert_load_max/layer": 1.5},
    {"step": 2, "loss": 0.5, "eval_loss": 0.7, "eval_ndcg_at_10": 0.4, "eval_beir_ndcg_at_10": 0.4},
]


def size_of(png):
    return [int.from_bytes(png[start : start + 4], "big") for start in (16, 20)]


def test_draws_a_panel_for_each_quantity(tmp_path):
    assert draw_run(HISTORY, tmp_path / "all.png")
    assert draw_run([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
    both = [(tmp_path / name).read_bytes() for name in ("all.png", "loss.png")]
    assert all(png.startswith(b"\x89PNG") for png in both)
    # Loss, nDCG, gradient norm and expert load, against loss alone.
    assert size_of(both[0]) == [840, 4 * 312]
    assert size_of(both[1]) == [840, 312]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "loss.png"]


def test_nothing_to_draw(tmp_path):
    assert not draw_run([{"step": 1, "epoch": 0.5}], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
