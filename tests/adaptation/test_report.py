import re

import pytest
from small_adaptations import make_settings

from modeling_querit.adaptation.report import write_report

STAGES = {"queries": {"seconds": 1.0, "counts": {"dropped": {"short": 2}}}}
QUERIES = [
    {"text": "a | b", "metadata": {"language": "en", "style": "title", "generator": "extractive", "document": "d1"}}
]


def make_row(positive, **scores):
    return {"query": "q", "documents": ["a", "b", "c"], "scores": scores, "positive": positive}


def table_of_teachers(tmp_path, rows, **teachers):
    """Teacher -> the other cells of its line in the report."""
    settings = make_settings(tmp_path, "x", teachers=teachers)
    assert write_report(settings, STAGES, QUERIES, rows) == {}
    page = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "a \\| b" in page
    section = re.search(r"## Teachers\n.*?\n\n(?=##)", page, re.DOTALL)
    if not section:
        return {}
    lines = [line.strip("| ").split(" | ") for line in section[0].splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines[2:]}


@pytest.mark.slow
def test_the_report_shows_how_teachers_rank_the_source_of_a_query(tmp_path):
    rows = [
        make_row(0, bm25=[3.0, 2.0, 1.0], student=[0.1, 0.2, 0.3]),
        make_row(1, bm25=[3.0, 2.0, 1.0], student=[0.1, 0.2, 0.3]),
        # The last of equal scores.
        make_row(2, bm25=[1.0, 1.0, 1.0], student=[0.1, 0.2, 0.3]),
        make_row(None, bm25=[3.0, 2.0, 1.0], student=[0.1, 0.2, 0.3]),
    ]
    teachers = make_settings(tmp_path, "x").model_dump(mode="json")["teachers"]
    teachers["bm25"]["weight"] = 3
    table = table_of_teachers(tmp_path, rows, **teachers)
    assert table["bm25"] == ["3", "33%", f"{(1 + 1 / 2 + 1 / 3) / 3:.2f}"]
    assert table["student"] == ["1", "33%", f"{(1 / 3 + 1 / 2 + 1) / 3:.2f}"]
    # BM25 weighs three times as much, so it decides the order, and the student where BM25 has equal scores.
    assert table["together"] == ["", "67%", f"{(1 + 1 / 2 + 1) / 3:.2f}"]


@pytest.mark.slow
@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
def test_the_section_is_left_out_without_sources(tmp_path, scores):
    teachers = make_settings(tmp_path, "x").model_dump(mode="json")["teachers"]
    assert table_of_teachers(tmp_path, [make_row(None, bm25=scores, student=scores)], **teachers) == {}
