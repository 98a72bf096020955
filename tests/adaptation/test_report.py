"""The page at the end of a run."""

import re

import pytest
from small_adaptations import make_settings

from modeling_querit.adaptation.report import write_report

STAGES = {"queries": {"seconds": 1.0, "counts": {"dropped": {"short": 2}}}}
QUERIES = [
    {"text": "a | b", "metadata": {"language": "en", "style": "title", "generator": "extractive", "document": "d1"}}
]


def row(positive, **scores):
    return {"query": "q", "documents": ["a", "b", "c"], "scores": scores, "positive": positive}


def teachers_in(tmp_path, rows, **teachers):
    """Teacher -> the cells of its line."""
    settings = make_settings(tmp_path, "x", teachers=teachers)
    assert write_report(settings, STAGES, QUERIES, rows) == {}
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "a \\| b" in page
    found = re.search(r"## Teachers\n.*?\n\n(?=##)", page, re.DOTALL)
    lines = [line.strip("| ").split(" | ") for line in found[0].splitlines() if line.startswith("| ")] if found else []
    return {name: cells for name, *cells in lines[2:]}


def test_where_teachers_put_the_document_of_a_query(tmp_path):
    rows = [
        row(0, bm25=[3.0, 2.0, 1.0], student=[0.1, 0.2, 0.3]),
        row(1, bm25=[3.0, 2.0, 1.0], student=[0.1, 0.2, 0.3]),
        # Of equal scores, the last.
        row(2, bm25=[1.0, 1.0, 1.0], student=[0.1, 0.2, 0.3]),
        row(None, bm25=[3.0, 2.0, 1.0], student=[0.1, 0.2, 0.3]),
    ]
    settings = make_settings(tmp_path, "x").model_dump(mode="json")["teachers"]
    settings["bm25"]["weight"] = 3
    found = teachers_in(tmp_path, rows, **settings)
    assert found["bm25"] == ["3", "33%", f"{(1 + 1 / 2 + 1 / 3) / 3:.2f}"]
    assert found["student"] == ["1", "33%", f"{(1 / 3 + 1 / 2 + 1) / 3:.2f}"]
    # BM25 counts three times, so its order is that of both, and where it knows none the student's.
    assert found["together"] == ["", "67%", f"{(1 + 1 / 2 + 1) / 3:.2f}"]


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
def test_without_documents_that_queries_were_written_for(tmp_path, scores):
    teachers = make_settings(tmp_path, "x").model_dump(mode="json")["teachers"]
    assert teachers_in(tmp_path, [row(None, bm25=scores, student=scores)], **teachers) == {}
