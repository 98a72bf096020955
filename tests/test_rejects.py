import json

from modeling_querit.rejects import Rejects


def test_rejected_rows_are_written_with_their_errors(tmp_path):
    with Rejects(tmp_path / "new" / "rejects.jsonl") as rejects:
        assert not rejects.path.parent.exists()
        rejects.add(ValueError("a.jsonl, line 2: no text."), {"_id": 7})
        rejects.add(ValueError("a.jsonl, line 3: no id"), "\ud800")
    entries = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert entries[0] == {"error": "a.jsonl, line 2: no text.", "row": '{"_id": 7}'}
    assert (rejects.count, rejects.first_error) == (2, "a.jsonl, line 2: no text.")


def test_discarding_leaves_nothing(tmp_path):
    with Rejects(tmp_path / "new" / "rejects.jsonl") as rejects:
        rejects.add(ValueError("x"), "y")
        rejects.discard()
    assert list(tmp_path.iterdir()) == []


def test_rows_may_be_counted_alone():
    rejects = Rejects(None)
    rejects.add(ValueError("x"), "y")
    assert rejects.count == 1
