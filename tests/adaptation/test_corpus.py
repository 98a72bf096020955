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
    cut,
    drop_near_duplicates,
    language_of,
    read_documents,
    sample,
    shares,
    with_languages,
)
from modeling_querit.files import write_jsonl

GERMAN = "Wie entferne ich ein Paket samt seiner Konfiguration von meinem Rechner?"
ENGLISH = "How do I remove a package together with its configuration from my machine?"
JAPANESE = "パッケージを設定ファイルごと削除する方法を教えてください。"


def read(path, content):
    """Documents of a file, and what was dropped."""
    path.write_bytes(content)
    dropped = Counter()
    return list(read_documents([str(path)], dropped)), dropped


def read_rows(path, *rows):
    return read(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "documents.jsonl"


# -- Reading


def test_a_file(path):
    rows = [{"_id": "a", "title": "Red  fox", "text": "A fox\n\tsleeps."}, {"_id": "b", "text": "A hen."}]
    assert read_rows(path, *rows) == (
        [{"_id": "a", "title": "Red fox", "text": "A fox sleeps."}, {"_id": "b", "title": "", "text": "A hen."}],
        {},
    )


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_a_folder_whose_judgements_are_not_looked_at(tmp_path, name):
    content = b'{"_id": "a", "text": "A fox."}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "queries.jsonl").write_bytes(b"\xff")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_bytes(b"\xff")
    assert [each["_id"] for each in read_documents([str(tmp_path)], Counter())] == ["a"]


def test_a_dataset_of_the_hub(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"docid": "a", "title": None, "text": "A fox."}])
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split, streaming: asked.append((name, split, streaming)) or rows.to_iterable_dataset(),
    )
    for source in ("someone/foxes", "someone/foxes:test"):
        assert list(read_documents([source], Counter())) == [{"_id": "a", "title": "", "text": "A fox."}]
    assert asked == [("someone/foxes", "train", True), ("someone/foxes", "test", True)]


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "none.json", "none", "."])
def test_sources_that_are_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"no corpus.jsonl|There is no"):
        list(read_documents([str(tmp_path / name)], Counter()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe\x00\x01", "not UTF-8"),
        ('{"text": "café"}'.encode("latin-1"), "not UTF-8"),
        (bytes(range(128, 256)), "not UTF-8"),
        (b'{"text": "cut', "no JSON"),
        (b"plain text", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"\x00", "no JSON"),
        (b'{"_id": "x"}', "no text"),
        (b'{"text": null}', "no text"),
        (b'{"text": 7}', "no text"),
        (b'{"text": ["a fox"]}', "no text"),
        (b'["text"]', "no text"),
        (b"null", "no text"),
        (b"7", "no text"),
        (b'"a JSON string"', "no text"),
        (b'{"text": "a fox", "title": ["x"]}', "title is no text"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\u00a0 "}', "empty"),
        (b'{"text": "... -- !?"}', "empty"),
        ('{"text": "。、！"}'.encode(), "empty"),
        (b'{"text": "a\\u0000b\\u0001c\\u0002"}', "binary"),
        (b'{"text": "PNG \\ufffd\\ufffd\\ufffd x"}', "binary"),
        (b'{"text": "fox \\ud800\\udc"}', "no JSON"),
        (b'{"text": "fox \\ud800"}', "binary"),
        (b'{"_id": "good", "text": "again"}', "id given twice"),
        (b'{"_id": 7, "text": "again"}', "id given twice"),
    ],
)
def test_what_is_no_document_is_counted(path, line, reason):
    good = b'{"_id": "good", "text": "A fox."}\n{"_id": "7", "text": "A hen."}\n'
    documents, dropped = read(path, good + line + b"\n\n   \n" + b'{"_id": "last", "text": "An owl."}')
    assert [each["_id"] for each in documents] == ["good", "7", "last"]
    assert dropped == {reason: 1}


@given(st.binary(max_size=300))
def test_junk(tmp_path, junk):
    documents, dropped = read(tmp_path / "documents.jsonl", junk)
    assert len(documents) + dropped.total() == sum(1 for line in junk.split(b"\n") if line.strip())


TEXT = st.text(st.characters(), max_size=5)
JSON = st.none() | st.booleans() | st.floats() | st.integers() | TEXT | st.lists(TEXT, max_size=2)
ROW = st.fixed_dictionaries({"text": TEXT | JSON}, optional={"_id": TEXT | JSON, "title": TEXT | JSON})


@given(st.lists(JSON | ROW | ROW, max_size=5))
def test_any_json_is_a_document_or_counted_by_reason(tmp_path, rows):
    documents, dropped = read_rows(tmp_path / "documents.jsonl", *rows)
    assert len(documents) + dropped.total() == len(rows)
    assert set(dropped) <= {"no text", "title is no text", "empty", "binary", "id given twice"}
    write_jsonl(documents, tmp_path / "written.jsonl")


def test_ids_can_be_written_too(path):
    (document,), _ = read_rows(path, {"_id": "a\ud800\x00b", "text": "A fox."})
    write_jsonl([document], path)
    assert json.loads(path.read_text(encoding="utf-8")) == document


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_in_other_encodings(path, encoding):
    documents, dropped = read(path, '{"text": "A fox."}\n{"text": "A hen."}\n'.encode(encoding))
    assert documents == []
    assert set(dropped) <= {"not UTF-8", "no JSON"}
    assert dropped.total() >= 2


def test_a_byte_order_mark_and_line_ends_of_windows(path):
    documents, dropped = read(path, b'\xef\xbb\xbf{"_id": "a", "text": "A fox."}\r\n{"_id": "b", "text": "A hen."}\r\n')
    assert [each["text"] for each in documents] == ["A fox.", "A hen."]
    assert not dropped


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "documents.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "A fox."}\n' * 100)[:-12])
    with pytest.raises((OSError, ValueError), match=r"documents\.jsonl\.gz"):
        list(read_documents([str(path)], Counter()))


def test_a_little_junk_is_cleaned_away(path):
    text = "\ufeffA fox\x00\x07 sleeps \ud800 in the winter.\x1b " + "It eats what it finds at night. " * 20
    (document,), dropped = read_rows(path, {"title": "a\x00\udfff  b", "text": text})
    assert document["title"] == "a b"
    assert document["text"].startswith("\ufeffA fox sleeps in the winter. It eats")
    assert not dropped


def test_other_scripts_stay_as_they_are(path):
    texts = [JAPANESE, "การลบแพ็กเกจพร้อมการตั้งค่า", "كيف أزيل حزمة مع إعداداتها؟", "‏שלום עולם‏", "👩‍👩‍👧 e\u0301 ﬁ"]
    documents, _ = read_rows(path, *({"text": text} for text in texts))
    assert [each["text"] for each in documents] == texts


def test_a_large_document(path):
    (document,), _ = read_rows(path, {"text": "fox " * 250_000 + "end"})
    assert document["text"].endswith("fox end")
    assert len(document["text"]) == 1_000_003


def test_ids(path):
    ids = [{"_id": 3}, {"_id": None, "id": 7}, {"docid": "x"}, {"_id": "a", "id": "b"}, {}, {"_id": 1.5}, {"_id": 0}]
    documents, _ = read_rows(path, *({**each, "text": "A fox."} for each in ids))
    assert [each["_id"] for each in documents] == ["3", "7", "x", "a", "#4", "1.5", "0"]


def test_numbers_for_ids_do_not_collide_between_files(tmp_path):
    for name in ("a", "b"):
        write_jsonl([{"text": f"fox {name}"}, {"text": f"hen {name}"}], tmp_path / f"{name}.jsonl")
    dropped = Counter()
    documents = list(read_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], dropped))
    assert [each["_id"] for each in documents] == ["#0", "#1", "#2", "#3"]
    assert not dropped


def test_an_id_in_two_sources(tmp_path):
    for name in ("a", "b"):
        write_jsonl([{"_id": "same", "text": f"fox {name}"}], tmp_path / f"{name}.jsonl")
    dropped = Counter()
    documents = list(read_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], dropped))
    assert [each["text"] for each in documents] == ["fox a"]
    assert dropped == {"id given twice": 1}


def test_an_id_of_what_was_dropped_is_free(path):
    documents, _ = read_rows(path, {"_id": "a", "text": ""}, {"_id": "a", "text": "A fox."})
    assert [each["text"] for each in documents] == ["A fox."]


# -- Cutting


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("a red fox", 9, "a red fox"),
        ("a red fox", 100, "a red fox"),
        ("a red fox", 8, "a red"),
        ("a red foxes", 9, "a red"),
        ("東京都の人口は多い", 4, "東京都の"),
        # A space long ago is no place to cut at.
        ("a 東京都の人口は多い", 8, "a 東京都の人口"[:8]),
    ],
)
def test_documents_are_cut_at_words(text, max_chars, expected):
    document = {"_id": "x", "title": "a title that is longer", "text": text}
    assert cut(document, max_chars) == document | {"text": expected}
    assert document["text"] == text


@given(st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: " ".join(text.split())), st.integers(1, 20))
def test_what_is_cut_is_a_beginning(text, max_chars):
    found = cut({"text": text}, max_chars)["text"]
    assert text.startswith(found)
    assert len(found) <= max_chars
    assert found or not text


# -- Languages


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
        # A short text is likest a language that it is not in.
        ("Kernel panic on Debian", "und"),
        # A curly quote or a dash makes no script without spaces.
        ("a fox’s", "und"),
        ("fox – hen", "und"),
        ("red foxes 京", "und"),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


@given(st.text(st.characters()))
def test_any_text_has_a_language_or_none(text):
    assert language_of(text) == language_of(text)
    assert language_of("1 2") == "und"


def test_a_large_text_is_told_by_its_head():
    assert language_of(ENGLISH * 100 + GERMAN * 100_000) == "en"


def test_documents_in_other_languages_are_dropped():
    documents = [{"_id": str(n), "text": text} for n, text in enumerate([GERMAN, ENGLISH, JAPANESE, "x"])]
    dropped = Counter()
    found = list(with_languages(documents, ["de", "ja"], dropped))
    assert [(each["_id"], each["language"]) for each in found] == [("0", "de"), ("2", "ja")]
    assert dropped == {"language": 2}
    dropped = Counter()
    assert [each["language"] for each in with_languages(documents, [], dropped)] == ["de", "en", "ja", "und"]
    assert not dropped


# -- Near-duplicates

WORDS = [f"word{n}" for n in range(400)]


def distinct(texts, similarity=0.9):
    documents = [{"_id": str(n), "title": "", "text": text} for n, text in enumerate(texts)]
    dropped = Counter()
    return [int(each["_id"]) for each in drop_near_duplicates(documents, dropped, similarity)], dropped


def test_of_two_that_are_alike_the_first_stays():
    text = " ".join(WORDS)
    texts = [text, text.upper() + "!", text.replace("word200", "other"), " ".join(WORDS[:200]), text + " x"]
    assert distinct(texts) == ([0, 3], {"duplicate": 1, "near-duplicate": 2})


def test_similarity_decides():
    # 200 of 400 words changed at the end: a third of the shingles are common.
    texts = [" ".join(WORDS), " ".join(WORDS[:200] + [f"other{n}" for n in range(200)])]
    assert distinct(texts, 0.9)[0] == [0, 1]
    assert distinct(texts, 0.15)[0] == [0]


def test_only_what_is_the_same_is_dropped():
    texts = [" ".join(WORDS), " ".join(WORDS[40:]), " ".join(WORDS).upper()]
    assert distinct(texts, 1.0)[0] == [0, 1]


def test_the_same_words_in_another_order_are_another_text():
    shuffled = random.Random(0).sample(WORDS, len(WORDS))
    assert distinct([" ".join(WORDS), " ".join(shuffled)])[0] == [0, 1]


def test_titles_count_for_near_duplicates():
    documents = [{"_id": name, "title": f"{name} fox", "text": "sleeps"} for name in ("red", "brown")]
    assert len(list(drop_near_duplicates(documents, Counter()))) == 2


@pytest.mark.parametrize("text", ["fox", "red fox", "東京都の人口", "การลบแพ็กเกจ", "شكرا", "fox " * 250_000])
def test_texts_of_any_length_have_duplicates(text):
    assert distinct([text, "something else", text]) == ([0, 1], {"duplicate": 1})


def test_long_documents_that_begin_alike_are_no_duplicates():
    head = " ".join(f"word{n}" for n in range(2000))
    texts = [head + " " + " ".join(f"{name}{n}" for n in range(2000)) for name in ("fox", "hen")]
    assert distinct(texts) == ([0, 1], {})


def test_near_duplicates_do_not_depend_on_global_random_states():
    texts = [each["text"] for each in make_documents(60)]
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        found.append(distinct(texts, 0.4))
    assert found[0] == found[1]
    assert 0 < len(found[0][0]) < 60


# -- Samples


def topics(counts):
    """Documents of topics that have no word in common."""
    rng = random.Random(0)
    return [
        {"_id": f"{topic}{n}", "title": "", "text": " ".join(f"{topic}{rng.randrange(30)}" for _ in range(30))}
        | {"language": "en"}
        for topic, count in counts.items()
        for n in range(count)
    ]


def test_a_sample_that_is_all():
    documents = topics({"fox": 5})
    assert sample(documents, 5, 0) == sample(documents, 9, 0) == documents


def test_each_language_gets_its_share():
    documents = [each | {"language": "de" if n % 10 == 0 else "en"} for n, each in enumerate(topics({"fox": 100}))]
    chosen = sample(documents, 20, 0)
    assert Counter(each["language"] for each in chosen) == {"en": 18, "de": 2}
    assert [each["_id"] for each in chosen] == [each["_id"] for each in documents if each in chosen]


def test_each_topic_gets_its_share():
    # Two clusters, for 250 documents.
    chosen = sample(topics({"fox": 225, "hen": 25}), 10, 0)
    assert Counter(each["_id"][:3] for each in chosen) == {"fox": 9, "hen": 1}


def test_samples_depend_on_the_seed_and_on_nothing_else():
    documents = topics({"fox": 150, "hen": 150})
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        found.append([each["_id"] for each in sample(documents, 20, 0)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert found[0] == found[1]
    assert found[0] != [each["_id"] for each in sample(documents, 20, 1)]


@pytest.mark.parametrize("text", ["x", "東京都", "同じ文書。" * 3])
def test_documents_that_are_all_the_same_can_be_sampled(text):
    documents = [{"_id": str(n), "title": "", "text": text, "language": "und"} for n in range(200)]
    assert len({each["_id"] for each in sample(documents, 7, 0)}) == 7


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
def test_shares(sizes, total, expected):
    assert shares(sizes, total) == expected


@given(st.dictionaries(st.integers(), st.integers(1, 200), min_size=1, max_size=12), st.integers(0, 400))
def test_shares_are_whole_and_fair(sizes, total):
    found = shares(sizes, total)
    assert list(found) == list(sizes)
    assert sum(found.values()) == min(total, sum(sizes.values()))
    assert all(0 <= found[key] <= size for key, size in sizes.items())
    if total >= len(sizes):
        assert all(found.values())
    for key, size in sizes.items():
        for other in sizes:
            # Nobody gets more than another who is larger.
            assert size >= sizes[other] or found[key] <= found[other] + 1
