"""The search for the t of a merge, on collections of a few queries."""

import json
import math
import tempfile
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_querit import QueritForSequenceRanking
from modeling_querit.files import write_jsonl
from modeling_querit.merging import merge
from modeling_querit.merging.merge import merge_checkpoints
from modeling_querit.merging.recipe import Recipe
from modeling_querit.merging.search import (
    Trial,
    ValidationSet,
    load_validation_sets,
    measure_ndcg,
    next_t,
    search_merge,
)

DOCUMENTS = [
    "a novel by lee",
    "who wrote the book is not known",
    "the judge wrote a novel about the content",
    "another book, and another",
    "nobody asked who wrote it",
    "Der Richter schrieb das Buch im Jahr 1831.",
    "f(x) meets the requirements",
    "the query asks",
]
QUERIES = ["who wrote the book", "a novel", "what the judge wrote", "requirements of the query"]


def write_collection(folder, splits=("dev",), shift=0):
    """Write a collection whose queries have a document of grade 2, one of grade 1 and one of grade 0."""
    write_jsonl([{"_id": f"d{n}", "text": text} for n, text in enumerate(DOCUMENTS)], folder / "corpus.jsonl")
    write_jsonl([{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)], folder / "queries.jsonl")
    (folder / "qrels").mkdir()
    for split in splits:
        rows = [
            f"q{query}\td{(3 * query + step + shift) % len(DOCUMENTS)}\t{2 - step}\n"
            for query in range(len(QUERIES))
            for step in range(3)
        ]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


def reference_ndcg(model, validation_set, shift=0, max_length=None):
    """Mean nDCG@10 over the queries, by the formula; equal scores keep the order of the first stage."""
    total = 0.0
    for number, query in enumerate(QUERIES):
        grades = {f"d{(3 * number + step + shift) % len(DOCUMENTS)}": 2 - step for step in range(3)}
        names = list(validation_set.candidates[f"q{number}"])
        scores = model.predict([(query, DOCUMENTS[int(name[1:])]) for name in names], max_length=max_length)
        order = [names[index] for index in scores.argsort(descending=True, stable=True)]
        gain = sum(grades.get(name, 0) / math.log2(rank + 2) for rank, name in enumerate(order))
        total += gain / (2 / math.log2(2) + 1 / math.log2(3))
    return total / len(QUERIES)


@pytest.fixture(scope="module")
def folders(processor, tmp_path_factory):
    """Three models, by architecture."""
    folders = {}

    def get(architecture):
        if architecture not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            for number, name in enumerate(["law", "medicine", "sport"]):
                model = tiny.make_model(architecture, processor)
                torch.manual_seed(number)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.2 * number)
                model.save_pretrained(folder / name)
            folders[architecture] = [str(folder / name) for name in ("law", "medicine", "sport")]
        return folders[architecture]

    return get


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("collections") / "books", ("dev", "test"))


@pytest.fixture(scope="module")
def validation_set(collection):
    return ValidationSet.load(f"{collection}:dev", queries=50, depth=20)


def recorded_t(folder):
    """The t of a merged model, by its record."""
    [t] = json.loads((folder / "merge.json").read_text())["recipe"]["t"]
    return t


def measure_by(ndcg_of):
    """A measure of one collection by a function of t, in place of the models' own nDCG."""
    return lambda folder: {"books:dev": ndcg_of(recorded_t(folder))}


def no_echo(line):
    """Print nothing."""


# Which t are tried


def tried_ts(evaluations, ndcg_of):
    """All t of a search whose merges would have this nDCG."""
    trials = []
    while (t := next_t(trials, evaluations)) is not None:
        trials.append(Trial(t, {"books": ndcg_of(t)}))
    return [trial.t for trial in trials]


def peak_at(best_t):
    """nDCG that falls with the distance from the best t; a gradient counts by its middle, and slightly less."""

    def ndcg_of(t):
        values = [float(value) for value in t.split(":")]
        return 1 - abs(sum(values) / len(values) - best_t) - 0.001 * (len(values) > 1)

    return ndcg_of


GRID = ["0.5", "0.0", "1.0", "0.25", "0.75"]


@pytest.mark.parametrize(
    ("evaluations", "peak", "expected"),
    [
        (5, 0.3, GRID),
        (6, 0.3, [*GRID, "0.375"]),
        (7, 0.3, [*GRID, "0:0.5", "0.5:0"]),
        (8, 0.3, [*GRID, "0.375", "0:0.5", "0.5:0"]),
        # 0.375 is not better than 0.25: the other side is next, which is more distant now.
        (9, 0.3, [*GRID, "0.375", "0.125", "0:0.5", "0.5:0"]),
        # 0.375 is better: next is the midpoint to 0.5, the better of its two neighbours.
        (9, 0.4, [*GRID, "0.375", "0.4375", "0.125:0.625", "0.625:0.125"]),
        # At an end there is only one side, and no t beyond it.
        (9, 0.0, [*GRID, "0.125", "0.0625", "0:0.25", "0.25:0"]),
        (9, 1.0, [*GRID, "0.875", "0.9375", "0.75:1", "1:0.75"]),
        (7, 0.8, [*GRID, "0.5:1", "1:0.5"]),
    ],
)
def test_the_search_narrows_down_around_the_peak(evaluations, peak, expected):
    assert tried_ts(evaluations, peak_at(peak)) == expected


def test_equal_merges_are_searched_around_the_middle():
    assert tried_ts(9, lambda t: 0.7)[5:] == ["0.375", "0.625", "0.25:0.75", "0.75:0.25"]


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9), st.integers(6, 30))
def test_every_t_is_new_and_beside_the_best(values, evaluations):
    values = values * 4
    trials = []
    while (t := next_t(trials, evaluations)) is not None:
        means = {float(trial.t): trial.mean for trial in trials if ":" not in trial.t}
        if len(trials) >= 5 and ":" not in t:
            assert float(t) not in means
            order = sorted([*means, float(t)])
            index = order.index(float(t))
            assert max(means.values()) in (means[order[index - 1]], means[order[index + 1]])
        trials.append(Trial(t, {"books": values[len(trials)]}))
    assert len(trials) == evaluations
    assert len({trial.t for trial in trials}) == evaluations


def test_the_mean_of_a_trial_is_that_of_its_collections():
    assert Trial("0.5", {"a": 0.25, "b": 0.75}).mean == 0.5


# How merges are measured


def test_a_validation_set_has_a_name_and_candidates(collection, validation_set):
    assert validation_set.name == "books:dev"
    assert set(validation_set.candidates) == {"q0", "q1", "q2", "q3"}
    all_documents = {f"d{n}" for n in range(len(DOCUMENTS))}
    assert all(set(candidates) == all_documents for candidates in validation_set.candidates.values())
    assert ValidationSet.load(str(collection), queries=50, depth=20).name == "books:dev"
    assert ValidationSet.load(f"{collection}:test", queries=50, depth=20).name == "books:test"


def test_queries_and_candidates_are_limited(collection):
    samples = [ValidationSet.load(f"{collection}:dev", queries=2, depth=3).candidates for _ in range(2)]
    assert samples[0] == samples[1]
    assert [len(candidates) for candidates in samples[0].values()] == [3, 3]
    draws = {tuple(ValidationSet.load(f"{collection}:dev", 2, 3, seed).candidates) for seed in range(8)}
    assert len(draws) > 1


def test_listed_candidates_come_before_the_first_stage(tmp_path):
    folder = write_collection(tmp_path / "books")
    (folder / "candidates").mkdir()
    (folder / "candidates" / "dev.tsv").write_text("q0\td5\nq0\td2\nq1\td3\n")
    candidates = ValidationSet.load(str(folder), queries=50, depth=3).candidates
    assert (set(candidates["q0"]), set(candidates["q1"])) == ({"d2", "d5"}, {"d3"})


def test_ndcg_is_that_of_the_formula(folders, validation_set):
    folder = folders("qwen3")[0]
    expected = reference_ndcg(QueritForSequenceRanking.from_pretrained(folder), validation_set)
    assert measure_ndcg(folder, [validation_set]) == {"books:dev": pytest.approx(expected, abs=1e-9)}


def test_ndcg_with_a_maximum_length(folders, validation_set):
    folder = folders("qwen3")[0]
    model = QueritForSequenceRanking.from_pretrained(folder)
    # The longest query leaves only two tokens of each document.
    limit = 2 + max(len(pair.input_ids) for pair in model.processor.encode(QUERIES, [""] * len(QUERIES)))
    expected = reference_ndcg(model, validation_set, max_length=limit)
    assert measure_ndcg(folder, [validation_set], limit) == {"books:dev": pytest.approx(expected, abs=1e-9)}
    assert expected != pytest.approx(reference_ndcg(model, validation_set), abs=1e-3)


def test_a_collection_without_relevant_documents_is_refused(tmp_path):
    folder = write_collection(tmp_path / "books")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    with pytest.raises(ValueError, match="books: no query has a relevant document"):
        ValidationSet.load(f"{folder}:dev", queries=50, depth=20)


@pytest.mark.parametrize("limits", [{"queries": 0}, {"queries": -1}, {"depth": 0}], ids=str)
def test_no_queries_or_no_candidates_are_refused(collection, limits):
    with pytest.raises(ValueError, match="at least one"):
        ValidationSet.load(str(collection), **{"queries": 2, "depth": 2} | limits)


@pytest.mark.parametrize("source", ["books:train", "nowhere"])
def test_a_missing_split_or_folder_is_named(collection, source):
    split = source.partition(":")[2] or "dev"
    with pytest.raises(FileNotFoundError, match=rf"{split}\.tsv is missing"):
        ValidationSet.load(str(collection.parent / source), queries=50, depth=20)


def test_two_collections_of_one_name_are_refused(collection, tmp_path):
    twin = write_collection(tmp_path / "books")
    with pytest.raises(ValueError, match="two collections called books:dev: rename"):
        load_validation_sets([str(collection), str(twin)])
    splits = load_validation_sets([f"{collection}:dev", f"{collection}:test"])
    assert [validation_set.name for validation_set in splits] == ["books:dev", "books:test"]


# The search


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_search_keeps_the_best_merge(folders, validation_set, tmp_path, architecture):
    """Each trial has the nDCG of a plain merge with its t, and the folder is that of the best one."""
    models = folders(architecture)[:2]
    other = ValidationSet.load(f"{write_collection(tmp_path / 'letters', shift=4)}:dev", queries=50, depth=20)
    measure = partial(measure_ndcg, validation_sets=[validation_set, other])
    lines = []
    trials = search_merge(Recipe(models), measure, tmp_path / "found" / "merged", evaluations=7, echo=lines.append)
    assert len(trials) == 7
    for trial in trials:
        plain = merge_checkpoints(Recipe(models, t=[trial.t]), tmp_path / trial.t / "merged")
        model = QueritForSequenceRanking.from_pretrained(plain)
        expected = {
            "books:dev": reference_ndcg(model, validation_set),
            "letters:dev": reference_ndcg(model, other, shift=4),
        }
        assert trial.metrics == pytest.approx(expected, abs=1e-9)
        assert trial.mean == pytest.approx(sum(expected.values()) / 2, abs=1e-9)
    assert lines == [f"t {trial.t}: nDCG@10 {100 * trial.mean:.2f}" for trial in trials]
    assert len({trial.mean for trial in trials}) > 2

    best = max(trials, key=lambda trial: trial.mean)
    plain, found = tmp_path / best.t / "merged", tmp_path / "found" / "merged"
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {"merge_search.json", "merge_search.png"}
    for name in names:
        assert (found / name).read_bytes() == (plain / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["merged"]


@pytest.mark.slow
def test_a_search_records_its_trials(folders, tmp_path):
    measure = measure_by(peak_at(0.4))
    trials = search_merge(Recipe(folders("qwen3")[:2]), measure, tmp_path / "merged", evaluations=9, echo=no_echo)
    assert [trial.t for trial in trials] == tried_ts(9, peak_at(0.4))
    assert max(trials, key=lambda trial: trial.mean).t == "0.375"
    assert recorded_t(tmp_path / "merged") == "0.375"
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["recipe"]["models"] == ["law", "medicine"]
    rows = json.loads((tmp_path / "merged" / "merge_search.json").read_text())["trials"]
    assert [row["t"] for row in rows] == [trial.t for trial in trials]
    for row, trial in zip(rows, trials, strict=True):
        assert row["books:dev"] == pytest.approx(100 * trial.metrics["books:dev"])
        assert row["mean"] == pytest.approx(100 * trial.mean)
    with Image.open(tmp_path / "merged" / "merge_search.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (840, 480)


@pytest.mark.slow
def test_a_search_writes_no_local_paths(folders, validation_set, collection, tmp_path):
    models, measure = folders("qwen3")[:2], partial(measure_ndcg, validation_sets=[validation_set])
    search_merge(Recipe(models), measure, tmp_path / "merged", evaluations=5, echo=no_echo)
    for path in (tmp_path / "merged").iterdir():
        content = path.read_bytes()
        for folder in (Path(models[0]).parent, collection.parent, tmp_path, Path(tempfile.gettempdir())):
            assert f"{folder}/".encode() not in content, path.name


@pytest.mark.slow
@pytest.mark.parametrize("best", ["1.0", "0.25", "0:0.5"])
def test_the_best_merge_is_kept_whenever_it_was_tried(folders, tmp_path, best):
    measure = measure_by(lambda t: 0.9 if t == best else 0.5 if t == "0.25" else 0.1)
    search_merge(Recipe(folders("qwen3")[:2]), measure, tmp_path / "merged", evaluations=7, echo=no_echo)
    assert recorded_t(tmp_path / "merged") == best
    plain = merge_checkpoints(Recipe(folders("qwen3")[:2], t=[best]), tmp_path / "plain")
    expected = tiny.read_tensors(plain)
    for key, tensor in tiny.read_tensors(tmp_path / "merged").items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.slow
def test_of_equal_merges_the_first_is_kept(folders, tmp_path):
    lines, measure = [], measure_by(lambda t: 0.5)
    search_merge(Recipe(folders("qwen3")[:2]), measure, tmp_path / "merged", evaluations=7, echo=lines.append)
    assert recorded_t(tmp_path / "merged") == "0.5"
    assert lines[-1] == "All merges rank alike: these collections do not tell which t is best."


@pytest.mark.slow
def test_gram_matrices_are_computed_once(folders, tmp_path, monkeypatch):
    calls, gram_matrix = [], merge.gram_matrix
    monkeypatch.setattr(merge, "gram_matrix", lambda tensors: calls.append(len(tensors)) or gram_matrix(tensors))
    measure = measure_by(peak_at(0.4))
    search_merge(Recipe(folders("qwen3")[:2]), measure, tmp_path / "merged", evaluations=7, echo=no_echo)
    assert calls == [2] * len(tiny.read_tensors(tmp_path / "merged"))


@pytest.mark.slow
def test_a_search_keeps_the_other_fields_of_a_recipe(folders, tmp_path):
    first, second, base = folders("qwen3")
    recipe = Recipe([first, second], method="task_arithmetic", base=base, scale=0.5, dtype="bfloat16")
    measure, destination = measure_by(peak_at(0.4)), tmp_path / "merged"
    search_merge(recipe, measure, destination, evaluations=5, max_shard_size="20KB", echo=no_echo)
    record = json.loads((destination / "merge.json").read_text())["recipe"]
    assert [record[key] for key in ("method", "base", "scale", "dtype", "t")] == [
        *("task_arithmetic", "sport", 0.5, "bfloat16"),
        ["0.5"],
    ]
    assert len(list(destination.glob("*.safetensors"))) > 2
    assert QueritForSequenceRanking.from_pretrained(destination).dtype == torch.bfloat16


# Errors


def never(folder):
    raise AssertionError("A merge was measured.")


def test_three_models_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="t of two models"):
        search_merge(Recipe(folders("qwen3")), never, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", [{"t": ["0.5"]}, {"weights": ["1,2"]}])
def test_a_recipe_with_t_or_weights_is_refused(folders, tmp_path, position):
    with pytest.raises(ValueError, match="neither t nor weights"):
        search_merge(Recipe(folders("qwen3")[:2], **position), never, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evaluations", [4, 0, -1])
def test_too_few_evaluations_are_refused(folders, tmp_path, evaluations):
    with pytest.raises(ValueError, match=f"at least 5 evaluations, not {evaluations}"):
        search_merge(Recipe(folders("qwen3")[:2]), never, tmp_path / "merged", evaluations=evaluations)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_not_overwritten(folders, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="merged"):
        search_merge(Recipe(folders("qwen3")[:2]), never, tmp_path / "merged", echo=no_echo)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_in_a_trial_leaves_nothing_behind(folders, tmp_path, monkeypatch, error):
    measured = []

    def fail(folder):
        measured.append(recorded_t(folder))
        if measured[-1] == "1.0":
            raise error("in the third trial")
        return {"books": 0.5}

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(error, match="in the third trial"):
        search_merge(Recipe(folders("qwen3")[:2]), fail, tmp_path / "out" / "merged", echo=no_echo)
    assert measured == ["0.5", "0.0", "1.0"]
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


# The command


@pytest.mark.slow
def test_the_command_searches_on_all_collections(querit, folders, collection, tmp_path):
    models, options = folders("qwen3")[:2], ["--search", f"{collection}:dev", "--search", f"{collection}:test"]
    code, out, err = querit("merge", *models, *options, "--evaluations", "5", "-o", tmp_path / "merged")
    assert (code, out) == (0, f"Wrote {tmp_path / 'merged'}\n")
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"t {t}" for t in GRID]
    assert all("nDCG@10" in line for line in lines)
    rows = json.loads((tmp_path / "merged" / "merge_search.json").read_text())["trials"]
    assert all(row["books:dev"] == row["books:test"] for row in rows)
    assert recorded_t(tmp_path / "merged") == max(rows, key=lambda row: row["mean"])["t"]


@pytest.mark.slow
def test_the_command_limits_queries_candidates_and_length(querit, folders, collection, tmp_path):
    models = folders("qwen3")[:2]
    options = ["--queries", "2", "--depth", "3", "--max-length", "64", "--evaluations", "5"]
    code, _, _ = querit("merge", *models, "--search", collection, *options, "-o", tmp_path / "merged")
    assert code == 0
    rows = json.loads((tmp_path / "merged" / "merge_search.json").read_text())["trials"]
    plain = merge_checkpoints(Recipe(models, t=[rows[0]["t"]]), tmp_path / "plain")
    expected = measure_ndcg(plain, load_validation_sets([str(collection)], queries=2, depth=3), max_length=64)
    assert rows[0]["books:dev"] == pytest.approx(100 * expected["books:dev"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--t", "0.5"], "neither t nor weights"),
        (["--weights", "1,2"], "neither t nor weights"),
        (["--evaluations", "4"], "at least 5 evaluations"),
        (["--search", "nowhere:dev"], "is missing"),
    ],
)
def test_wrong_options_of_the_command_are_one_line(querit, folders, collection, tmp_path, options, message):
    models = folders("qwen3")[:2]
    code, out, err = querit("merge", *models, "--search", f"{collection}:dev", *options, "-o", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_three_models(querit, folders, collection, tmp_path):
    code, _, err = querit("merge", *folders("qwen3"), "--search", collection, "-o", tmp_path / "merged")
    assert (code, err) == (2, "querit: --search finds the t of two models: name two, and neither t nor weights.\n")
