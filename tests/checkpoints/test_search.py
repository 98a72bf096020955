"""The search for the t of a merge, on collections of a few queries."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints import merge, search
from modeling_querit.checkpoints.merge import Recipe, merge_checkpoints
from modeling_querit.checkpoints.search import Judged, Trial, search_merge
from modeling_querit.files import write_jsonl

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
    """Every query has a document of grade 2, one of grade 1 and one that was judged and is not relevant."""
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


def reference_ndcg(model, judged, shift=0, max_length=None):
    """The mean over the queries, by the formula; equal scores keep the order of the first stage."""
    total = 0.0
    for number, query in enumerate(QUERIES):
        grades = {f"d{(3 * number + step + shift) % len(DOCUMENTS)}": 2 - step for step in range(3)}
        names = list(judged.candidates[f"q{number}"])
        scores = model.predict([(query, DOCUMENTS[int(name[1:])]) for name in names], max_length=max_length)
        order = [names[place] for place in scores.argsort(descending=True, stable=True)]
        gain = sum(grades.get(name, 0) / math.log2(rank + 2) for rank, name in enumerate(order))
        total += gain / (2 / math.log2(2) + 1 / math.log2(3))
    return total / len(QUERIES)


@pytest.fixture(scope="module")
def folders(processor, tmp_path_factory):
    """Two models and a third one, by architecture."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            for number, name in enumerate(["law", "medicine", "sport"]):
                model = tiny.make_model(architecture, processor)
                torch.manual_seed(number)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.2 * number)
                model.save_pretrained(folder / name)
            made[architecture] = [str(folder / name) for name in ("law", "medicine", "sport")]
        return made[architecture]

    return get


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("collections") / "books", ("dev", "test"))


@pytest.fixture(scope="module")
def judged(collection):
    return Judged.load(f"{collection}:dev", queries=50, depth=20)


@pytest.fixture
def measured(monkeypatch):
    """Figures made by hand, in the place of those of the models; the t they were asked for, in order."""
    asked = []

    def set_figures(figure_of):
        def figures(folder, collections, max_length):
            [t] = json.loads((folder / "merge.json").read_text())["recipe"]["t"]
            asked.append(t)
            return {each.name: figure_of(t) for each in collections}

        monkeypatch.setattr(search, "_figures", figures)
        return asked

    return set_figures


def quiet(line):
    """For `echo`."""


# Which t are tried


def tried(evaluations, figure_of):
    """All t of a search whose merges would have these figures."""
    trials = []
    for t in search._next_t(trials, evaluations):
        trials.append(Trial(t, {"books": figure_of(t)}))
    return [trial.t for trial in trials]


def peak_at(place):
    """Less, the further away; a t that goes through the layers counts by its middle, and a little less."""

    def figure_of(t):
        values = [float(each) for each in t.split(":")]
        return 1 - abs(sum(values) / len(values) - place) - 0.001 * (len(values) > 1)

    return figure_of


GRID = ["0.5", "0.0", "1.0", "0.25", "0.75"]


@pytest.mark.parametrize(
    ("evaluations", "peak", "expected"),
    [
        (5, 0.3, GRID),
        (6, 0.3, [*GRID, "0.375"]),
        (7, 0.3, [*GRID, "0:0.5", "0.5:0"]),
        (8, 0.3, [*GRID, "0.375", "0:0.5", "0.5:0"]),
        # 0.375 is not better than 0.25: the other side comes next, which is further away now.
        (9, 0.3, [*GRID, "0.375", "0.125", "0:0.5", "0.5:0"]),
        # 0.375 is better: then between it and 0.5, which is the better one of the two beside it.
        (9, 0.4, [*GRID, "0.375", "0.4375", "0.125:0.625", "0.625:0.125"]),
        # At an end there is only one side, and no t beyond.
        (9, 0.0, [*GRID, "0.125", "0.0625", "0:0.25", "0.25:0"]),
        (9, 1.0, [*GRID, "0.875", "0.9375", "0.75:1", "1:0.75"]),
        (7, 0.8, [*GRID, "0.5:1", "1:0.5"]),
    ],
)
def test_which_t_are_tried_in_which_order(evaluations, peak, expected):
    assert tried(evaluations, peak_at(peak)) == expected


def test_where_all_are_equal_it_is_about_the_middle():
    assert tried(9, lambda t: 0.7)[5:] == ["0.375", "0.625", "0.25:0.75", "0.75:0.25"]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({0.0: 0.1, 0.5: 0.9, 1.0: 0.2}, 0.75),
        ({0.0: 0.2, 0.5: 0.9, 1.0: 0.1}, 0.25),
        # Further away comes before better.
        ({0.0: 0.1, 0.5: 0.9, 0.75: 0.8, 1.0: 0.2}, 0.25),
        ({0.0: 0.9, 0.25: 0.8, 1.0: 0.1}, 0.125),
        ({0.0: 0.1, 0.75: 0.8, 1.0: 0.9}, 0.875),
    ],
)
def test_the_middle_beside_the_best(means, expected):
    assert search._beside_the_best(means) == expected


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9), st.integers(6, 30))
def test_every_t_is_a_new_one_between_neighbours_of_the_best(figures, evaluations):
    figures = figures * 4
    trials = []
    for t in search._next_t(trials, evaluations):
        means = {float(each.t): each.mean for each in trials if ":" not in each.t}
        if len(trials) >= 5 and ":" not in t:
            assert float(t) not in means
            order = sorted([*means, float(t)])
            place = order.index(float(t))
            assert max(means.values()) in (means[order[place - 1]], means[order[place + 1]])
        trials.append(Trial(t, {"books": figures[len(trials)]}))
    assert len(trials) == evaluations
    assert len({trial.t for trial in trials}) == evaluations


def test_the_mean_of_a_trial_is_that_of_its_collections():
    assert Trial("0.5", {"a": 0.25, "b": 0.75}).mean == 0.5


# What they are measured by


def test_a_judged_collection(collection, judged):
    assert judged.name == "books:dev"
    assert set(judged.candidates) == {"q0", "q1", "q2", "q3"}
    assert all(set(hits) == {f"d{n}" for n in range(len(DOCUMENTS))} for hits in judged.candidates.values())
    assert Judged.load(str(collection), queries=50, depth=20).name == "books:dev"
    assert Judged.load(f"{collection}:test", queries=50, depth=20).name == "books:test"


def test_some_queries_and_candidates(collection):
    few = [Judged.load(f"{collection}:dev", queries=2, depth=3) for _ in range(2)]
    assert few[0].candidates == few[1].candidates
    assert len(few[0].candidates) == 2
    assert [len(hits) for hits in few[0].candidates.values()] == [3, 3]
    drawn = {tuple(Judged.load(f"{collection}:dev", 2, 3, seed).candidates) for seed in range(8)}
    assert len(drawn) > 1


def test_listed_candidates(tmp_path):
    folder = write_collection(tmp_path / "books")
    (folder / "candidates").mkdir()
    (folder / "candidates" / "dev.tsv").write_text("q0\td5\nq0\td2\nq1\td3\n")
    candidates = Judged.load(str(folder), queries=50, depth=3).candidates
    assert (set(candidates["q0"]), set(candidates["q1"])) == ({"d2", "d5"}, {"d3"})


def test_ndcg_is_that_of_the_formula(folders, judged):
    model = QueritForSequenceRanking.from_pretrained(folders("qwen3")[0])
    assert judged.ndcg(model) == pytest.approx(reference_ndcg(model, judged), abs=1e-9)


def test_ndcg_with_a_limit_of_tokens(folders, judged):
    model = QueritForSequenceRanking.from_pretrained(folders("qwen3")[0])
    # Of the longest query nothing is left but the first two tokens of each document.
    limit = 2 + max(len(pair.input_ids) for pair in model.processor.encode(QUERIES, [""] * len(QUERIES)))
    assert judged.ndcg(model, limit) == pytest.approx(reference_ndcg(model, judged, max_length=limit), abs=1e-9)
    assert judged.ndcg(model, limit) != pytest.approx(judged.ndcg(model), abs=1e-3)


def test_no_judged_query(tmp_path):
    folder = write_collection(tmp_path / "books")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n")
    with pytest.raises(ValueError, match="books: its judgements have no relevant document"):
        Judged.load(f"{folder}:dev", queries=50, depth=20)


@pytest.mark.parametrize("given", [{"queries": 0}, {"queries": -1}, {"depth": 0}], ids=str)
def test_nothing_to_rank(collection, given):
    with pytest.raises(ValueError, match="nothing is ranked with less than 1 of each"):
        Judged.load(str(collection), **{"queries": 2, "depth": 2} | given)


def test_a_split_that_is_not_there(collection):
    with pytest.raises(FileNotFoundError, match=r"train\.tsv is missing"):
        Judged.load(f"{collection}:train", queries=50, depth=20)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv is missing"):
        Judged.load(str(tmp_path / "nowhere"), queries=50, depth=20)


# The search


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_search_keeps_the_best_merge(folders, judged, tmp_path, architecture):
    """With real figures: each is that of a plain merge with this t, and the folder is that of the best one."""
    models = folders(architecture)[:2]
    other = Judged.load(f"{write_collection(tmp_path / 'letters', shift=4)}:dev", queries=50, depth=20)
    said = []
    trials = search_merge(
        Recipe(models), [judged, other], tmp_path / "found" / "merged", evaluations=7, echo=said.append
    )
    assert len(trials) == 7
    for trial in trials:
        plain = merge_checkpoints(Recipe(models, t=[trial.t]), tmp_path / trial.t / "merged")
        model = QueritForSequenceRanking.from_pretrained(plain)
        expected = {
            "books:dev": reference_ndcg(model, judged),
            "letters:dev": reference_ndcg(model, other, shift=4),
        }
        assert trial.figures == pytest.approx(expected, abs=1e-9)
        assert trial.mean == pytest.approx(sum(expected.values()) / 2, abs=1e-9)
    assert said == [f"t {trial.t}: nDCG@10 {100 * trial.mean:.2f}" for trial in trials]
    assert len({trial.mean for trial in trials}) > 2

    best = max(trials, key=lambda trial: trial.mean)
    plain, found = tmp_path / best.t / "merged", tmp_path / "found" / "merged"
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {"merge_search.json", "merge_search.png"}
    for name in names:
        assert (found / name).read_bytes() == (plain / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["merged"]


def test_what_a_search_writes_down(folders, judged, tmp_path, measured):
    asked = measured(peak_at(0.4))
    trials = search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "merged", evaluations=9, echo=quiet)
    assert asked == [trial.t for trial in trials] == tried(9, peak_at(0.4))
    assert max(trials, key=lambda trial: trial.mean).t == "0.375"
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["recipe"]["t"] == ["0.375"]
    assert record["recipe"]["models"] == ["law", "medicine"]
    found = json.loads((tmp_path / "merged" / "merge_search.json").read_text())
    assert [row["t"] for row in found["trials"]] == asked
    for row, trial in zip(found["trials"], trials, strict=True):
        assert row["books:dev"] == pytest.approx(100 * trial.figures["books:dev"])
        assert row["mean"] == pytest.approx(100 * trial.mean)
    with Image.open(tmp_path / "merged" / "merge_search.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (840, 480)


def test_nothing_tells_of_this_machine(folders, judged, collection, tmp_path, measured):
    measured(peak_at(0.4))
    models = folders("qwen3")[:2]
    search_merge(Recipe(models), [judged], tmp_path / "merged", evaluations=5, echo=quiet)
    for path in (tmp_path / "merged").iterdir():
        content = path.read_bytes()
        for folder in (Path(models[0]).parent, collection.parent, tmp_path, Path(tempfile.gettempdir())):
            assert f"{folder}/".encode() not in content, path.name


@pytest.mark.parametrize("best", ["1.0", "0.25", "0:0.5"])
def test_whichever_is_best_is_kept(folders, judged, tmp_path, measured, best):
    measured(lambda t: 0.9 if t == best else 0.5 if t == "0.25" else 0.1)
    search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "merged", evaluations=7, echo=quiet)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["recipe"]["t"] == [best]
    plain = merge_checkpoints(Recipe(folders("qwen3")[:2], t=[best]), tmp_path / "plain")
    expected = tiny.read_tensors(plain)
    for key, tensor in tiny.read_tensors(tmp_path / "merged").items():
        assert torch.equal(tensor, expected[key]), key


def test_of_equal_ones_the_first_is_kept(folders, judged, tmp_path, measured):
    measured(lambda t: 0.5)
    told = []
    search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "merged", evaluations=7, echo=told.append)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["recipe"]["t"] == ["0.5"]
    assert told[-1] == "All rank alike: these collections tell nothing about t."


def test_angles_are_computed_once(folders, judged, tmp_path, measured, monkeypatch):
    measured(peak_at(0.4))
    calls = []

    def counted(chunk):
        calls.append(len(chunk))
        return gram_of(chunk)

    gram_of = merge.gram_of
    monkeypatch.setattr(merge, "gram_of", counted)
    search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "merged", evaluations=7, echo=quiet)
    assert calls == [2] * len(tiny.read_tensors(tmp_path / "merged"))


def test_a_search_takes_the_rest_of_a_recipe(folders, judged, tmp_path, measured):
    measured(peak_at(0.4))
    first, second, base = folders("qwen3")
    recipe = Recipe([first, second], method="task_arithmetic", base=base, scale=0.5, dtype="bfloat16")
    search_merge(recipe, [judged], tmp_path / "merged", evaluations=5, max_shard_size="20KB", echo=quiet)
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())["recipe"]
    assert [record[key] for key in ("method", "base", "scale", "dtype", "t")] == [
        *("task_arithmetic", "sport", 0.5, "bfloat16"),
        ["0.5"],
    ]
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert QueritForSequenceRanking.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


# Errors


def test_three_models(folders, judged, tmp_path):
    with pytest.raises(ValueError, match="t of two models"):
        search_merge(Recipe(folders("qwen3")), [judged], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [{"t": ["0.5"]}, {"weights": ["1,2"]}])
def test_a_t_that_is_given(folders, judged, tmp_path, given):
    with pytest.raises(ValueError, match="neither t nor weights"):
        search_merge(Recipe(folders("qwen3")[:2], **given), [judged], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evaluations", [4, 0, -1])
def test_too_few_evaluations(folders, judged, tmp_path, evaluations):
    with pytest.raises(ValueError, match=f"5 evaluations at least, not {evaluations}"):
        search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "merged", evaluations=evaluations)
    assert list(tmp_path.iterdir()) == []


def test_two_collections_of_one_name(folders, judged, tmp_path):
    twin = Judged.load(f"{write_collection(tmp_path / 'books')}:dev", queries=50, depth=20)
    for collections in ([judged, twin], []):
        with pytest.raises(ValueError, match="a name of its own"):
            search_merge(Recipe(folders("qwen3")[:2]), collections, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_two_splits_of_one_collection_are_two(folders, judged, collection, tmp_path, measured):
    measured(peak_at(0.4))
    other = Judged.load(f"{collection}:test", queries=50, depth=20)
    trials = search_merge(Recipe(folders("qwen3")[:2]), [judged, other], tmp_path / "merged", evaluations=5, echo=quiet)
    assert set(trials[0].figures) == {"books:dev", "books:test"}


def test_what_is_there_is_not_overwritten(folders, judged, tmp_path, measured):
    asked = measured(peak_at(0.4))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="merged exists"):
        search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "merged", echo=quiet)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["notes.txt"]
    assert asked == []


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_nothing_behind(folders, judged, tmp_path, measured, monkeypatch, error):
    def fail(t):
        if t == "1.0":
            raise error("in the middle")
        return 0.5

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    asked = measured(fail)
    with pytest.raises(error, match="in the middle"):
        search_merge(Recipe(folders("qwen3")[:2]), [judged], tmp_path / "out" / "merged", echo=quiet)
    assert asked == ["0.5", "0.0", "1.0"]
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


# The command


def test_command(querit, folders, collection, tmp_path):
    models, options = folders("qwen3")[:2], ["--search", f"{collection}:dev", "--search", f"{collection}:test"]
    code, out, err = querit("merge", *models, *options, "--evaluations", "5", "-o", tmp_path / "merged")
    assert (code, out) == (0, f"Wrote {tmp_path / 'merged'}\n")
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"t {t}" for t in GRID]
    assert all("nDCG@10" in line for line in lines)
    found = json.loads((tmp_path / "merged" / "merge_search.json").read_text())["trials"]
    assert all(row["books:dev"] == row["books:test"] for row in found)
    best = max(found, key=lambda row: row["mean"])["t"]
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["recipe"]["t"] == [best]


def test_command_with_few_queries_and_candidates(querit, folders, collection, tmp_path, monkeypatch):
    seen = []
    options = ["--queries", "2", "--depth", "3", "--max-length", "64", "--evaluations", "5"]
    monkeypatch.setattr(search, "_figures", lambda folder, *given: seen.append(given) or {"books:dev": 0.5})
    code, _, _ = querit("merge", *folders("qwen3")[:2], "--search", collection, *options, "-o", tmp_path / "merged")
    assert code == 0
    [[judged], limit] = seen[0]
    assert ([len(hits) for hits in judged.candidates.values()], limit) == ([3, 3], 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--t", "0.5"], "neither t nor weights"),
        (["--weights", "1,2"], "neither t nor weights"),
        (["--evaluations", "4"], "5 evaluations at least"),
        (["--search", "nowhere:dev"], "is missing"),
    ],
)
def test_command_with_what_does_not_go_together(querit, folders, collection, tmp_path, options, message):
    models = folders("qwen3")[:2]
    code, out, err = querit("merge", *models, "--search", f"{collection}:dev", *options, "-o", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_command_with_three_models(querit, folders, collection, tmp_path):
    code, _, err = querit("merge", *folders("qwen3"), "--search", collection, "-o", tmp_path / "merged")
    assert (code, err) == (2, "querit: --search finds the t of two models: name two, and neither t nor weights.\n")
