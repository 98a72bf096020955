import pytest

from modeling_querit.evaluation.score_store import ScoreStore, share


def test_scores_of_all_processes_are_read_exactly(tmp_path):
    for process in (0, 1):
        store = ScoreStore(tmp_path / "scores")
        store.add(f"q{process}", [0.1, -1 / 3], process)
        store.close()
    assert ScoreStore(tmp_path / "scores").read() == {"q0": [0.1, -1 / 3], "q1": [0.1, -1 / 3]}


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_line_that_was_cut_off_by_a_kill_is_scored_again(tmp_path, cut):
    store = ScoreStore(tmp_path)
    store.add("q1", [0.5], 0)
    store.add("ü 2", [0.25, 0.125], 0)
    store.close()
    content = (tmp_path / "0.jsonl").read_bytes()
    (tmp_path / "0.jsonl").write_bytes(content[:-cut])
    assert ScoreStore(tmp_path).read() == {"q1": [0.5]}
    store.add("q3", [], 0)
    store.close()
    assert store.read() == {"q1": [0.5], "q3": []}
    store.remove()
    assert store.read() == {}


def test_processes_share_what_is_left():
    queries = [str(number) for number in range(10)]
    shares = [share(queries, {"0": [], "4": []}, process, 3) for process in range(3)]
    assert sorted(query for part in shares for query in part) == [query for query in queries if query not in ("0", "4")]
    assert {len(part) for part in shares} == {2, 3}
