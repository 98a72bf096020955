import shutil

import pytest
from safetensors.torch import load_file, save_file
from small_adaptations import make_documents, make_settings, write_collection

from modeling_querit import QueritForSequenceRanking
from modeling_querit.adaptation import measuring
from modeling_querit.adaptation.measuring import evaluate
from modeling_querit.adaptation.teachers import CrossEncoderTeacher
from modeling_querit.evaluation.metrics import mean, ndcg
from modeling_querit.retrieval.bm25 import BM25
from modeling_querit.training.calibration import Teachers
from modeling_querit.training.distillation import TEACHERS_FILE

DOCUMENTS = {each["_id"]: each for each in make_documents()}
QUERIES = {f"q{n}": each["title"] for n, each in enumerate(make_documents()[:6])}
QRELS = {f"q{n}": {f"d{n}": 1} for n in range(6)}
MAX_LENGTH = 64
DEPTH = 5


@pytest.fixture
def source(tmp_path):
    return f"{write_collection(tmp_path / 'collection')}:test"


@pytest.fixture
def adapted(tmp_path, saved_folders):
    """A folder as training leaves it: a model whose weights are others."""
    folder = shutil.copytree(saved_folders("qwen3"), tmp_path / "run" / "train" / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name] = tensors[name].flip(-1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    calibrate(folder.parent, ["bm25", "student"])
    return folder


def calibrate(folder, names, weights=None):
    """As if scores had gone from -1 to 10."""
    scores = [-1.0 + 0.1 * n for n in range(111)]
    Teachers.fit([dict.fromkeys(names, scores)], weights).save(folder / TEACHERS_FILE)


@pytest.fixture
def settings(tmp_path, saved_folders):
    return make_settings(tmp_path, saved_folders("qwen3"), evaluation_depth=DEPTH, evaluation_max_length=MAX_LENGTH)


def candidates():
    hits = BM25(DOCUMENTS).search(list(QUERIES.values()), DEPTH)
    return {query: [each for each, _ in some] for query, some in zip(QUERIES, hits, strict=True)}


def figure_of(score):
    """100 * mean nDCG@10 of BM25's first, in the order of a score of query and document."""
    rankings = {
        query: sorted(found, key=lambda each: -score(QUERIES[query], DOCUMENTS[each]))
        for query, found in candidates().items()
    }
    return 100 * mean(ndcg(QRELS, rankings))


def predict_of(folder):
    model = QueritForSequenceRanking.from_pretrained(folder)
    return lambda query, document: float(model.predict([(query, document)], max_length=MAX_LENGTH)[0])


def test_models_are_measured_in_the_dtype_that_is_asked_for(settings, source, adapted, saved_folders):
    rounded = evaluate(settings.model_copy(update={"evaluation_dtype": "bfloat16"}), source)
    model = QueritForSequenceRanking.from_pretrained(adapted, dtype="bfloat16")
    expected = figure_of(lambda query, document: float(model.predict([(query, document)], max_length=MAX_LENGTH)[0]))
    assert rounded["adapted"] == pytest.approx(expected)


def test_figures_are_those_of_the_rankings(settings, source, adapted, saved_folders):
    figures = evaluate(settings, source)
    assert list(figures) == ["collection", "queries", "first_stage", "teacher", "general", "adapted", "p_value"]
    assert (figures["collection"], figures["queries"]) == ("collection", 6)
    assert figures["first_stage"] == pytest.approx(100 * mean(ndcg(QRELS, candidates())))
    general, after = predict_of(saved_folders("qwen3")), predict_of(adapted)
    assert figures["general"] == pytest.approx(figure_of(general))
    assert figures["adapted"] == pytest.approx(figure_of(after))
    assert figures["general"] != figures["adapted"]
    assert 0 < figures["p_value"] <= 1
    index = BM25(DOCUMENTS)

    def labels(query, document):
        """The 1st and 99th percentile of -1, -0.9, ..., 10 are -0.89 and 9.89."""
        scores = (general(query, document), index.scores(query, [document["_id"]])[0])
        return sum(min(1, max(0, (score + 0.89) / 10.78)) for score in scores)

    assert figures["teacher"] == pytest.approx(figure_of(labels))


def test_a_split_that_is_not_the_usual_one_is_in_the_name(settings, source, adapted):
    folder = source.removesuffix(":test")
    shutil.copy(f"{folder}/qrels/test.tsv", f"{folder}/qrels/dev.tsv")
    names = [evaluate(settings, f"{folder}{split}")["collection"] for split in ("", ":test", ":dev")]
    assert names == ["collection", "collection", "collection:dev"]


def test_the_weights_of_teachers_count(settings, source, adapted):
    calibrate(adapted.parent, ["bm25", "student"], {"bm25": 1e6, "student": 1.0})
    assert evaluate(settings, source)["teacher"] == pytest.approx(100)


def test_what_is_the_same_is_no_better(settings, source, adapted, saved_folders):
    shutil.rmtree(adapted)
    shutil.copytree(saved_folders("qwen3"), adapted)
    figures = evaluate(settings, source)
    assert figures["adapted"] == figures["general"]
    assert figures["p_value"] == 1.0


def test_nothing_is_computed_twice(settings, source, adapted, monkeypatch):
    figures = evaluate(settings, source)
    scored = []
    score = CrossEncoderTeacher.score
    monkeypatch.setattr(
        CrossEncoderTeacher, "score", lambda self, pairs: scored.append(self.name) or score(self, pairs)
    )
    assert evaluate(settings, source) == figures
    assert scored == []
    # A model that has been trained again is another one.
    tensors = load_file(adapted / "model.safetensors")
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name] = 2 * tensors[name]
    save_file(tensors, adapted / "model.safetensors", metadata={"format": "pt"})
    evaluate(settings, source)
    assert scored == [str(adapted)]


def test_a_model_that_teaches_is_asked_once(settings, source, adapted, saved_folders, monkeypatch):
    values = settings.model_dump(mode="json")
    values["teachers"]["student"]["max_length"] = MAX_LENGTH
    asked = []
    score = CrossEncoderTeacher.score

    def counted(self, pairs):
        asked.extend((self.name, query, document["_id"]) for query, document in pairs)
        return score(self, pairs)

    monkeypatch.setattr(CrossEncoderTeacher, "score", counted)
    figures = evaluate(type(settings).model_validate(values), source)
    assert len(asked) == len(set(asked)) == 2 * 6 * DEPTH
    assert figures["general"] == pytest.approx(figure_of(predict_of(saved_folders("qwen3"))))


def test_the_split_is_test_by_default(settings, source, adapted):
    assert evaluate(settings, source.removesuffix(":test")) == evaluate(settings, source)
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv"):
        evaluate(settings, source.replace(":test", ":dev"))


class Partial:
    """A teacher that knows what is asked for, and has no score for it, or one below all others."""

    batch_size = 4

    def __init__(self, relevant):
        self.relevant, self.identity = relevant, ["partial", str(relevant)]

    def score(self, pairs):
        return [self.relevant if document["title"] == query else 5.0 for query, document in pairs]


def test_what_could_not_be_scored_comes_last(settings, source, adapted, monkeypatch):
    calibrate(adapted.parent, ["partial"])
    last = []
    for relevant in (None, float("nan"), 0.0):
        # Its score is none, or the least of all.
        monkeypatch.setattr(measuring, "make_teachers", lambda *_, relevant=relevant: {"partial": Partial(relevant)})
        last.append(evaluate(settings, source)["teacher"])
    assert last == pytest.approx([100 / 2.584962500721156] * 3)


@pytest.mark.parametrize("name", ["general", "adapted"])
def test_a_teacher_of_any_name(settings, source, adapted, tmp_path, saved_folders, name):
    """That of one of the models measured, for one."""
    calibrate(adapted.parent, [name])
    values = settings.model_dump(mode="json") | {"teachers": {name: {"type": "first-stage", "model": "bm25"}}}
    figures = evaluate(type(settings).model_validate(values), source)
    assert figures["teacher"] == pytest.approx(100)
    assert figures["general"] == pytest.approx(figure_of(predict_of(saved_folders("qwen3"))))


@pytest.mark.parametrize("values", [{}, {"queries": {"round_trip": 0}, "evaluation": ["collection:test"]}])
def test_ready_runs_rank_other_queries(tmp_path, values):
    """They find nothing for queries that are not theirs: said before anything is done."""
    with pytest.raises(ValueError, match="first_stages are runs only"):
        make_settings(tmp_path, "x", candidates={"first_stages": ["a.run"]}, **values)


def test_ready_runs_are_enough_without_a_round_trip(tmp_path):
    values = {"candidates": {"first_stages": ["a.run"]}, "queries": {"round_trip": 0}}
    assert make_settings(tmp_path, "x", **values).candidates.first_stages == ["a.run"]
