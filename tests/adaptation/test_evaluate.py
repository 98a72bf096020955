import shutil

import pytest
from safetensors.torch import load_file, save_file
from small_adaptations import make_documents, make_settings, write_collection

from modeling_querit import QueritForSequenceRanking
from modeling_querit.adaptation.evaluate import evaluate_adaptation
from modeling_querit.adaptation.teachers import TEACHERS, CrossEncoderTeacher
from modeling_querit.evaluation.metrics import mean, ndcg
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.training.distillation import TEACHERS_FILE
from modeling_querit.training.teacher_labels import Teachers

DOCUMENTS = {document["_id"]: document for document in make_documents()}
QUERIES = {f"q{n}": document["title"] for n, document in enumerate(make_documents()[:6])}
QRELS = {f"q{n}": {f"d{n}": 1} for n in range(6)}
MAX_LENGTH = 64
DEPTH = 5


@pytest.fixture
def source(tmp_path):
    return f"{write_collection(tmp_path / 'collection')}:test"


@pytest.fixture
def adapted(tmp_path, saved_folders):
    """The folder of an adapted model, as training leaves it, with other weights."""
    folder = shutil.copytree(saved_folders("qwen3"), tmp_path / "run" / "train" / "model")
    change_head(folder, lambda weight: weight.flip(-1).contiguous())
    calibrate(folder.parent, ["bm25", "student"])
    return folder


def change_head(folder, change):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def calibrate(folder, names, weights=None):
    """Calibrate teachers as if their scores were -1, -0.9, ..., 10."""
    scores = [-1.0 + 0.1 * n for n in range(111)]
    Teachers.fit([dict.fromkeys(names, scores)], weights).save(folder / TEACHERS_FILE)


@pytest.fixture
def settings(tmp_path, saved_folders):
    return make_settings(tmp_path, saved_folders("qwen3"), evaluation_depth=DEPTH, evaluation_max_length=MAX_LENGTH)


def candidates():
    rankings = BM25(DOCUMENTS).search(list(QUERIES.values()), DEPTH)
    return {query: [document for document, _ in hits] for query, hits in zip(QUERIES, rankings, strict=True)}


def ndcg_of(score):
    """100 x mean nDCG@10 of BM25's candidates, in the order of a function of query and document."""
    rankings = {
        query: sorted(documents, key=lambda document: -score(QUERIES[query], DOCUMENTS[document]))
        for query, documents in candidates().items()
    }
    return 100 * mean(ndcg(QRELS, rankings))


def score_function(folder, **options):
    model = QueritForSequenceRanking.from_pretrained(folder, **options)
    return lambda query, document: float(model.predict([(query, document)], max_length=MAX_LENGTH)[0])


@pytest.mark.slow
def test_the_model_computes_in_the_dtype_of_the_settings(settings, source, adapted):
    metrics = evaluate_adaptation(settings.model_copy(update={"evaluation_dtype": "bfloat16"}), source)
    assert metrics["adapted"] == pytest.approx(ndcg_of(score_function(adapted, dtype="bfloat16")))


@pytest.mark.slow
def test_metrics_are_those_of_the_rankings(settings, source, adapted, saved_folders):
    metrics = evaluate_adaptation(settings, source)
    assert list(metrics) == ["collection", "queries", "first_stage", "teacher", "general", "adapted", "p_value"]
    assert (metrics["collection"], metrics["queries"]) == ("collection", 6)
    assert metrics["first_stage"] == pytest.approx(100 * mean(ndcg(QRELS, candidates())))
    general, after = score_function(saved_folders("qwen3")), score_function(adapted)
    assert metrics["general"] == pytest.approx(ndcg_of(general))
    assert metrics["adapted"] == pytest.approx(ndcg_of(after))
    assert metrics["general"] != metrics["adapted"]
    assert 0 < metrics["p_value"] <= 1
    index = BM25(DOCUMENTS)

    def label(query, document):
        """The 1st and 99th percentile of -1, -0.9, ..., 10 are -0.89 and 9.89."""
        scores = (general(query, document), index.scores(query, [document["_id"]])[0])
        return sum(min(1, max(0, (score + 0.89) / 10.78)) for score in scores)

    assert metrics["teacher"] == pytest.approx(ndcg_of(label))


@pytest.mark.slow
def test_a_split_other_than_test_is_named(settings, source, adapted):
    folder = source.removesuffix(":test")
    shutil.copy(f"{folder}/qrels/test.tsv", f"{folder}/qrels/dev.tsv")
    names = [evaluate_adaptation(settings, f"{folder}{split}")["collection"] for split in ("", ":test", ":dev")]
    assert names == ["collection", "collection", "collection:dev"]


@pytest.mark.slow
def test_teachers_count_by_their_weights(settings, source, adapted):
    calibrate(adapted.parent, ["bm25", "student"], {"bm25": 1e6, "student": 1.0})
    assert evaluate_adaptation(settings, source)["teacher"] == pytest.approx(100)


def test_equal_models_do_not_differ(settings, source, adapted, saved_folders):
    shutil.rmtree(adapted)
    shutil.copytree(saved_folders("qwen3"), adapted)
    metrics = evaluate_adaptation(settings, source)
    assert metrics["adapted"] == metrics["general"]
    assert metrics["p_value"] == 1.0


@pytest.mark.slow
def test_scores_are_cached_by_weights(settings, source, adapted, monkeypatch):
    metrics = evaluate_adaptation(settings, source)
    scored = []
    score = CrossEncoderTeacher.score
    monkeypatch.setattr(
        CrossEncoderTeacher, "score", lambda self, pairs: scored.append(self.name) or score(self, pairs)
    )
    assert evaluate_adaptation(settings, source) == metrics
    assert scored == []
    change_head(adapted, lambda weight: 2 * weight)
    evaluate_adaptation(settings, source)
    assert scored == [str(adapted)]


@pytest.mark.slow
def test_a_model_that_is_teacher_and_student_scores_once(settings, source, adapted, saved_folders, monkeypatch):
    values = settings.model_dump(mode="json")
    values["teachers"]["student"]["max_length"] = MAX_LENGTH
    scored = []
    score = CrossEncoderTeacher.score

    def score_and_log(self, pairs):
        scored.extend((self.name, query, document["_id"]) for query, document in pairs)
        return score(self, pairs)

    monkeypatch.setattr(CrossEncoderTeacher, "score", score_and_log)
    metrics = evaluate_adaptation(type(settings).model_validate(values), source)
    assert len(scored) == len(set(scored)) == 2 * 6 * DEPTH
    assert metrics["general"] == pytest.approx(ndcg_of(score_function(saved_folders("qwen3"))))


def test_the_split_is_test_by_default(settings, source, adapted):
    assert evaluate_adaptation(settings, source.removesuffix(":test")) == evaluate_adaptation(settings, source)
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv"):
        evaluate_adaptation(settings, source.replace(":test", ":dev"))


class PartialTeacher:
    """Scores every document 5, but the relevant one otherwise."""

    batch_size = 4

    def __init__(self, relevant):
        self.relevant, self.identity = relevant, ["partial", str(relevant)]

    def score(self, pairs):
        return [self.relevant if document["title"] == query else 5.0 for query, document in pairs]


def test_a_document_without_a_score_ranks_last(settings, source, adapted, monkeypatch):
    calibrate(adapted.parent, ["partial"])
    monkeypatch.setitem(TEACHERS, "partial", PartialTeacher)
    ndcgs = []
    # No score, NaN, or one below all others.
    for relevant in (None, float("nan"), 0.0):
        values = settings.model_dump(mode="json") | {"teachers": {"partial": {"relevant": relevant}}}
        ndcgs.append(evaluate_adaptation(type(settings).model_validate(values), source)["teacher"])
    assert ndcgs == pytest.approx([100 / 2.584962500721156] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["general", "adapted"])
def test_a_teacher_may_be_named_like_a_student(settings, source, adapted, saved_folders, name):
    calibrate(adapted.parent, [name])
    values = settings.model_dump(mode="json") | {"teachers": {name: {"type": "first-stage", "model": "bm25"}}}
    metrics = evaluate_adaptation(type(settings).model_validate(values), source)
    assert metrics["teacher"] == pytest.approx(100)
    assert metrics["general"] == pytest.approx(ndcg_of(score_function(saved_folders("qwen3"))))
