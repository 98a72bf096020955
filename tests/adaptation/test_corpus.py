import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_adaptations import make_documents

from modeling_querit.adaptation.corpus import (
    add_languages,
    allocate,
    detect_language,
    drop_near_duplicates,
    read_corpus,
    sample,
    truncate,
)
from modeling_querit.files import write_jsonl

GERMAN = "Wie entferne ich ein Paket samt seiner Konfiguration von meinem Rechner?"
ENGLISH = "How do I remove a package together with its configuration from my machine?"
JAPANESE = "パッケージを設定ファイルごと削除する方法を教えてください。"


def read(path, content):
    """The documents of a file, and the counter of dropped rows."""
    path.write_bytes(content)
    dropped = Counter()
    return list(read_corpus([str(path)], dropped)), dropped


def read_rows(path, *rows):
    return read(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "documents.jsonl"


# -- Reading


def test_a_file_is_read(path):
    rows = [{"_id": "a", "title": "Red  fox", "text": "A fox\n\tsleeps."}, {"_id": "b", "text": "A hen."}]
    assert read_rows(path, *rows) == (
        [{"_id": "a", "title": "Red fox", "text": "A fox sleeps."}, {"_id": "b", "title": "", "text": "A hen."}],
        {},
    )


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_a_folder_is_read_without_its_judgements(tmp_path, name):
    content = b'{"_id": "a", "text": "A fox."}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "queries.jsonl").write_bytes(b"\xff")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_bytes(b"\xff")
    assert [document["_id"] for document in read_corpus([str(tmp_path)], Counter())] == ["a"]


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"docid": "a", "title": None, "text": "A fox."}])
    calls = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split, streaming: calls.append((name, split, streaming)) or rows.to_iterable_dataset(),
    )
    for source in ("someone/foxes", "someone/foxes:test"):
        assert list(read_corpus([source], Counter())) == [{"_id": "a", "title": "", "text": "A fox."}]
    assert calls == [("someone/foxes", "train", True), ("someone/foxes", "test", True)]


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "none.json", "none", "."])
def test_a_missing_source_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"no corpus.jsonl|No such file or folder"):
        list(read_corpus([str(tmp_path / name)], Counter()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe\x00\x01", "not UTF-8"),
        ('{"text": "café"}'.encode("latin-1"), "not UTF-8"),
        (bytes(range(128, 256)), "not UTF-8"),
        (b'{"text": "cut', "not JSON"),
        (b"plain text", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\x00", "not JSON"),
        (b'{"_id": "x"}', "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": 7}', "no text"),
        (b'{"text": ["a fox"]}', "no text"),
        (b'["text"]', "no text"),
        (b"null", "no text"),
        (b"7", "no text"),
        (b'"a JSON string"', "no text"),
        (b'{"text": "a fox", "title": ["x"]}', "title is not a string"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\u00a0 "}', "empty"),
        (b'{"text": "... -- !?"}', "empty"),
        ('{"text": "。、！"}'.encode(), "empty"),
        (b'{"text": "a\\u0000b\\u0001c\\u0002"}', "binary"),
        (b'{"text": "PNG \\ufffd\\ufffd\\ufffd x"}', "binary"),
        (b'{"text": "fox \\ud800\\udc"}', "not JSON"),
        (b'{"text": "fox \\ud800"}', "binary"),
        (b'{"_id": "good", "text": "again"}', "duplicate id"),
        (b'{"_id": 7, "text": "again"}', "duplicate id"),
    ],
)
def test_rows_that_are_not_documents_are_counted_by_reason(path, line, reason):
    good = b'{"_id": "good", "text": "A fox."}\n{"_id": "7", "text": "A hen."}\n'
    documents, dropped = read(path, good + line + b"\n\n   \n" + b'{"_id": "last", "text": "An owl."}')
    assert [document["_id"] for document in documents] == ["good", "7", "last"]
    assert dropped == {reason: 1}


@given(st.binary(max_size=300))
def test_every_line_of_junk_is_read_or_counted(tmp_path, junk):
    documents, dropped = read(tmp_path / "documents.jsonl", b'{"text": "A fox."}\n' + junk)
    assert len(documents) + dropped.total() == 1 + sum(1 for line in junk.split(b"\n") if line.strip())


TEXT = st.text(st.characters(), max_size=5)
JSON = st.none() | st.booleans() | st.floats() | st.integers() | TEXT | st.lists(TEXT, max_size=2)
ROW = st.fixed_dictionaries({"text": TEXT | JSON}, optional={"_id": TEXT | JSON, "title": TEXT | JSON})


@given(st.lists(JSON | ROW | ROW, max_size=5))
def test_every_json_value_is_read_or_counted(tmp_path, rows):
    documents, dropped = read_rows(tmp_path / "documents.jsonl", {"text": "A fox."}, *rows)
    assert len(documents) + dropped.total() == 1 + len(rows)
    assert set(dropped) <= {"no text", "title is not a string", "empty", "binary", "duplicate id"}
    write_jsonl(documents, tmp_path / "written.jsonl")


def test_ids_are_cleaned_so_that_they_can_be_written(path):
    (document,), _ = read_rows(path, {"_id": "a\ud800\x00b", "text": "A fox."})
    write_jsonl([document], path)
    assert json.loads(path.read_text(encoding="utf-8")) == document


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_in_other_encodings_are_refused(path, encoding):
    with pytest.raises(ValueError, match=r"documents\.jsonl is in UTF-16 or UTF-32, or no text: save it as UTF-8\."):
        read(path, '{"text": "A fox."}\n{"text": "A hen."}\n'.encode(encoding))


def test_byte_order_marks_and_windows_line_ends_are_ignored(path):
    documents, dropped = read(path, b'\xef\xbb\xbf{"_id": "a", "text": "A fox."}\r\n{"_id": "b", "text": "A hen."}\r\n')
    assert [document["text"] for document in documents] == ["A fox.", "A hen."]
    assert not dropped


def test_a_truncated_gzip_file_is_named(tmp_path):
    path = tmp_path / "documents.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "A fox."}\n' * 100)[:-12])
    with pytest.raises((OSError, ValueError), match=r"documents\.jsonl\.gz"):
        list(read_corpus([str(path)], Counter()))


def test_a_few_control_characters_are_removed(path):
    text = "\ufeffA fox\x00\x07 sleeps \ud800 in the winter.\x1b " + "It eats what it finds at night. " * 20
    (document,), dropped = read_rows(path, {"title": "a\x00\udfff  b", "text": text})
    assert document["title"] == "a b"
    assert document["text"].startswith("\ufeffA fox sleeps in the winter. It eats")
    assert not dropped


def test_other_scripts_are_left_as_they_are(path):
    texts = [JAPANESE, "การลบแพ็กเกจพร้อมการตั้งค่า", "كيف أزيل حزمة مع إعداداتها؟", "‏שלום עולם‏", "👩‍👩‍👧 e\u0301 ﬁ"]
    documents, _ = read_rows(path, *({"text": text} for text in texts))
    assert [document["text"] for document in documents] == texts


@pytest.mark.slow
def test_a_document_of_a_million_characters_is_read(path):
    (document,), _ = read_rows(path, {"text": "fox " * 250_000 + "end"})
    assert document["text"].endswith("fox end")
    assert len(document["text"]) == 1_000_003


def test_ids_come_from_several_fields(path):
    ids = [{"_id": 3}, {"_id": None, "id": 7}, {"docid": "x"}, {"_id": "a", "id": "b"}, {}, {"_id": 1.5}, {"_id": 0}]
    documents, _ = read_rows(path, *({**row, "text": "A fox."} for row in ids))
    assert [document["_id"] for document in documents] == ["3", "7", "x", "a", "#4", "1.5", "0"]


def test_ids_made_from_row_numbers_do_not_collide_between_files(tmp_path):
    for name in ("a", "b"):
        write_jsonl([{"text": f"fox {name}"}, {"text": f"hen {name}"}], tmp_path / f"{name}.jsonl")
    dropped = Counter()
    documents = list(read_corpus([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], dropped))
    assert [document["_id"] for document in documents] == ["#0", "#1", "#2", "#3"]
    assert not dropped


def test_an_id_in_two_sources_is_a_duplicate(tmp_path):
    for name in ("a", "b"):
        write_jsonl([{"_id": "same", "text": f"fox {name}"}], tmp_path / f"{name}.jsonl")
    dropped = Counter()
    documents = list(read_corpus([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], dropped))
    assert [document["text"] for document in documents] == ["fox a"]
    assert dropped == {"duplicate id": 1}


def test_the_id_of_a_dropped_row_can_be_used(path):
    documents, _ = read_rows(path, {"_id": "a", "text": ""}, {"_id": "a", "text": "A fox."})
    assert [document["text"] for document in documents] == ["A fox."]


# -- Truncation


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("a red fox", 9, "a red fox"),
        ("a red fox", 100, "a red fox"),
        ("a red fox", 8, "a red"),
        ("a red foxes", 9, "a red"),
        ("東京都の人口は多い", 4, "東京都の"),
        # A space in the first half is not used.
        ("a 東京都の人口は多い", 8, "a 東京都の人口"[:8]),
    ],
)
def test_documents_are_truncated_at_words(text, max_chars, expected):
    document = {"_id": "x", "title": "a title that is longer", "text": text}
    assert truncate(document, max_chars) == document | {"text": expected}
    assert document["text"] == text


@given(st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: " ".join(text.split())), st.integers(1, 20))
def test_a_truncated_text_is_a_prefix(text, max_chars):
    head = truncate({"text": text}, max_chars)["text"]
    assert text.startswith(head)
    assert len(head) <= max_chars
    assert head or not text


# -- Languages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "language"),
    [
        (GERMAN, "de"),
        (ENGLISH, "en"),
        (JAPANESE, "ja"),
        ("如何删除软件包及其配置文件", "zh"),
        ("การลบแพ็กเกจพร้อมการตั้งค่าทั้งหมด", "th"),
        ("كيف أزيل حزمة مع كل إعداداتها من جهازي؟", "ar"),
        ("패키지와 설정을 함께 삭제하는 방법", "ko"),
        ("", "und"),
        ("a fox", "und"),
        ("12345 67890 12345 67890 12345", "und"),
        ("東京都", "und"),
        # The most probable language of a short text is often a wrong one.
        ("Kernel panic on Debian", "und"),
        # A curly quote or a dash does not count as a dense script.
        ("a fox’s", "und"),
        ("fox – hen", "und"),
        ("red foxes 京", "und"),
    ],
)
def test_languages_are_detected(text, language):
    assert detect_language(text) == language


@given(st.text(st.characters()))
def test_detection_is_deterministic_for_any_text(text):
    assert detect_language(text) == detect_language(text)
    assert detect_language("1 2") == "und"


def test_a_long_text_is_detected_by_its_head():
    assert detect_language(ENGLISH * 100 + GERMAN * 100_000) == "en"


def test_documents_in_other_languages_are_dropped():
    documents = [{"_id": str(n), "text": text} for n, text in enumerate([GERMAN, ENGLISH, JAPANESE, "x"])]
    dropped = Counter()
    wanted = list(add_languages(documents, ["de", "ja"], dropped))
    assert [(document["_id"], document["language"]) for document in wanted] == [("0", "de"), ("2", "ja")]
    assert dropped == {"language": 2}
    dropped = Counter()
    assert [document["language"] for document in add_languages(documents, [], dropped)] == ["de", "en", "ja", "und"]
    assert not dropped


# -- Near-duplicates

WORDS = [f"word{n}" for n in range(400)]


def distinct(texts, similarity=0.9):
    documents = [{"_id": str(n), "title": "", "text": text} for n, text in enumerate(texts)]
    dropped = Counter()
    return [int(document["_id"]) for document in drop_near_duplicates(documents, dropped, similarity)], dropped


def test_the_first_of_several_near_duplicates_stays():
    text = " ".join(WORDS)
    texts = [text, text.upper() + "!", text.replace("word200", "other"), " ".join(WORDS[:200]), text + " x"]
    assert distinct(texts) == ([0, 3], {"duplicate": 1, "near-duplicate": 2})


def test_the_similarity_threshold_decides():
    # With the last 200 of 400 words changed, a third of the shingles are common.
    texts = [" ".join(WORDS), " ".join(WORDS[:200] + [f"other{n}" for n in range(200)])]
    assert distinct(texts, 0.9)[0] == [0, 1]
    assert distinct(texts, 0.15)[0] == [0]


def test_at_similarity_1_only_equal_documents_are_dropped():
    texts = [" ".join(WORDS), " ".join(WORDS[40:]), " ".join(WORDS).upper()]
    assert distinct(texts, 1.0)[0] == [0, 1]


def test_word_order_matters():
    shuffled = random.Random(0).sample(WORDS, len(WORDS))
    assert distinct([" ".join(WORDS), " ".join(shuffled)])[0] == [0, 1]


def test_titles_matter_for_near_duplicates():
    documents = [{"_id": name, "title": f"{name} fox", "text": "sleeps"} for name in ("red", "brown")]
    assert len(list(drop_near_duplicates(documents, Counter()))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["fox", "red fox", "東京都の人口", "การลบแพ็กเกจ", "شكرا", "fox " * 250_000])
def test_texts_of_any_length_can_be_duplicates(text):
    assert distinct([text, "something else", text]) == ([0, 1], {"duplicate": 1})


def test_long_documents_with_the_same_beginning_are_not_duplicates():
    head = " ".join(f"word{n}" for n in range(2000))
    texts = [head + " " + " ".join(f"{name}{n}" for n in range(2000)) for name in ("fox", "hen")]
    assert distinct(texts) == ([0, 1], {})


def test_near_duplicates_do_not_depend_on_global_random_state():
    texts = [document["text"] for document in make_documents(60)]
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        results.append(distinct(texts, 0.4))
    assert results[0] == results[1]
    assert 0 < len(results[0][0]) < 60


# -- Samples


def topics(counts):
    """Documents of topics without a word in common."""
    rng = random.Random(0)
    return [
        {"_id": f"{topic}{n}", "title": "", "text": " ".join(f"{topic}{rng.randrange(30)}" for _ in range(30))}
        | {"language": "en"}
        for topic, count in counts.items()
        for n in range(count)
    ]


def test_a_small_collection_is_its_own_sample():
    documents = topics({"fox": 5})
    assert sample(documents, 5, 0) == sample(documents, 9, 0) == documents


def test_languages_are_sampled_in_proportion():
    foxes = topics({"fox": 100})
    documents = [document | {"language": "de" if n % 10 == 0 else "en"} for n, document in enumerate(foxes)]
    chosen = sample(documents, 20, 0)
    assert Counter(document["language"] for document in chosen) == {"en": 18, "de": 2}
    assert [document["_id"] for document in chosen] == [document["_id"] for document in documents if document in chosen]


def test_topics_are_sampled_in_proportion():
    # Two clusters, for 250 documents.
    chosen = sample(topics({"fox": 225, "hen": 25}), 10, 0)
    assert Counter(document["_id"][:3] for document in chosen) == {"fox": 9, "hen": 1}


def test_samples_depend_on_the_seed_alone():
    documents = topics({"fox": 150, "hen": 150})
    samples = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        samples.append([document["_id"] for document in sample(documents, 20, 0)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert samples[0] == samples[1]
    assert samples[0] != [document["_id"] for document in sample(documents, 20, 1)]


@pytest.mark.parametrize("text", ["x", "東京都", "同じ文書。" * 3])
def test_equal_documents_can_be_sampled(text):
    documents = [{"_id": str(n), "title": "", "text": text, "language": "und"} for n in range(200)]
    assert len({document["_id"] for document in sample(documents, 7, 0)}) == 7


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ({"en": 90, "de": 9, "fi": 1}, 10, {"en": 8, "de": 1, "fi": 1}),
        ({"en": 90, "de": 9, "fi": 1}, 2, {"en": 2, "de": 0, "fi": 0}),
        ({"a": 1, "b": 1}, 5, {"a": 1, "b": 1}),
        ({"a": 3}, 0, {"a": 0}),
        ({}, 5, {}),
    ],
)
def test_draws_are_allocated_in_proportion(sizes, total, expected):
    assert allocate(sizes, total) == expected


@given(st.dictionaries(st.integers(), st.integers(1, 200), min_size=1, max_size=12), st.integers(0, 400))
def test_allocations_add_up_and_are_fair(sizes, total):
    counts = allocate(sizes, total)
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == min(total, sum(sizes.values()))
    assert all(0 <= counts[key] <= size for key, size in sizes.items())
    if total >= len(sizes):
        assert all(counts.values())
    for key, size in sizes.items():
        for other in sizes:
            # A smaller stratum does not get more than a larger one.
            assert size >= sizes[other] or counts[key] <= counts[other] + 1
