"""Reranking: nDCG, MRR, MAP, precision and recall of rankings, by trec_eval's own code."""

from collections import defaultdict
from pathlib import Path

import datasets
import evaluate

from .measures import DEFAULT_MEASURES, mean, measure, measure_rows

_DESCRIPTION = """\
How well documents are ranked for queries: nDCG@k, MRR@k, MAP, precision@k and recall@k, of each query and on average,
computed by trec_eval's own code (pytrec_eval). Takes rows of (score, label, query id), or judgements and a run.
"""
_KWARGS_DESCRIPTION = """\
Args:
    predictions (list of float): Scores of (query, document) pairs, higher is more relevant.
    references (list of float): Labels of these pairs; above 0 is relevant. Soft labels are allowed.
    query_ids (list of str): Ids of the pairs' queries.
    qrels (dict or str): In place of rows: query id -> document id -> grade, or a file of judgements.
    run (dict or str): With qrels: query id -> document id -> score, query id -> document ids, or a TREC run file.
    measures (list of str): ndcg_at_K, mrr_at_K, map, map_at_K, precision_at_K, recall_at_K.
    per_query (bool): Whether the values of every query are returned too.
Returns:
    A value in [0, 1] for every measure, `queries` (how many were measured) and, with per_query, `per_query`
    (measure -> query id -> value).
Examples:
    >>> metric = evaluate.load("metrics/reranking")
    >>> metric.compute(predictions=[0.9, 0.1], references=[0, 1], query_ids=["q", "q"], measures=["mrr_at_10"])
    {'mrr_at_10': 0.5, 'queries': 1}
    >>> metric.compute(qrels={"q": {"a": 1}}, run={"q": {"a": 0.7, "b": 0.2}}, measures=["ndcg_at_10"])
    {'ndcg_at_10': 1.0, 'queries': 1}
"""
_CITATION = """\
@inproceedings{VanGysel2018pytreceval,
    title={Pytrec\\_eval: An Extremely Fast Python Interface to trec\\_eval},
    author={Van Gysel, Christophe and de Rijke, Maarten},
    booktitle={SIGIR},
    year={2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Reranking(evaluate.Metric):
    """Measures of rankings."""

    def _info(self):
        features = {name: datasets.Value("float64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features | {"query_ids": datasets.Value("string")}),
            reference_urls=["https://github.com/usnistgov/trec_eval", "https://github.com/cvangysel/pytrec_eval"],
        )

    def add_batch(self, *, predictions=None, references=None, query_ids=None, **kwargs):
        """Add rows; query ids may be numbers."""
        query_ids = None if query_ids is None else [str(query) for query in query_ids]
        super().add_batch(predictions=predictions, references=references, query_ids=query_ids, **kwargs)

    def compute(self, *, qrels=None, run=None, measures=DEFAULT_MEASURES, per_query=False, **rows):
        """Measure rows, those of `add_batch` included, or else judgements and a run."""
        if qrels is None and run is None:
            return super().compute(measures=list(measures), per_query=per_query, **rows)
        if qrels is None or run is None or any(value is not None for value in rows.values()):
            raise ValueError("Give rows (predictions, references, query_ids), or qrels and run.")
        qrels = qrels if isinstance(qrels, dict) else read_qrels(qrels)
        run = run if isinstance(run, dict) else read_run(run)
        return _summary(measure(qrels, run, measures, require_all=True), per_query)

    def _compute(self, predictions, references, query_ids, measures, per_query):
        values = measure_rows(predictions, references, query_ids, measures)
        if not any(values.values()):
            raise ValueError("No query has a label above 0, so nothing can be measured.")
        return _summary(values, per_query)


def read_qrels(path):
    """Read judgements: TREC (`query 0 document grade`) or BEIR (`query document grade`, with or without a header)."""
    qrels = defaultdict(dict)
    for number, fields in _read_fields(path):
        if number == 1 and not _is_number(fields[-1]):
            continue
        if len(fields) not in (3, 4) or not _is_number(fields[-1]) or float(fields[-1]) % 1:
            raise ValueError(f"{path}, line {number}: not 'query 0 document grade' with a whole number.")
        _add(qrels, fields[0], fields[-2], int(float(fields[-1])), f"{path}, line {number}")
    return dict(qrels)


def read_run(path):
    """Read a TREC run, lines of `query Q0 document rank score tag`."""
    run = defaultdict(dict)
    for number, fields in _read_fields(path):
        if len(fields) not in (5, 6) or not _is_number(fields[4]):
            raise ValueError(f"{path}, line {number}: not 'query Q0 document rank score tag'.")
        _add(run, fields[0], fields[2], float(fields[4]), f"{path}, line {number}")
    return dict(run)


def _read_fields(path):
    with Path(path).open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line.split()


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _add(table, query, document, value, place):
    if document in table[query]:
        raise ValueError(f"{place}: query {query!r} has document {document!r} twice.")
    table[query][document] = value


def _summary(values, per_query):
    summary = {name: mean(of_queries) for name, of_queries in values.items()}
    summary["queries"] = len(next(iter(values.values()), ()))
    return summary | ({"per_query": values} if per_query else {})
