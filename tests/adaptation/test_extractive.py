import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_adaptations import make_documents

from modeling_querit.adaptation.extractive import ExtractiveGenerator, sentences, without_copy
from modeling_querit.adaptation.prompts import STYLES, QueryRequest

FAUST = {
    "_id": "faust",
    "title": "Faust",
    "text": "Goethe wrote a tragedy in two parts. Faust sells his soul to the devil. Gretchen dies in the dungeon.",
}
OTHERS = [
    {"_id": "devil", "title": "", "text": "The devil wrote letters in the night. His soul is black in parts."},
    {"_id": "house", "title": "House", "text": "A house in two parts. A dungeon is in the house."},
]
ANY_TEXT = st.text(st.characters()) | st.text("a .。!？\n\u0e01\u0628\ud800\x00", max_size=60)


def extract(document, *styles, others=OTHERS, seed=0):
    generator = ExtractiveGenerator([document, *others], seed)
    return generator.generate([QueryRequest(document, style, "en") for style in styles])


def document_of(text, title=""):
    return {"_id": "x", "title": title, "text": text}


# -- Sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Faust sold his soul. Goethe wrote it down.", ["Dr. Faust sold his soul.", "Goethe wrote it down."]),
        ("Is it the fox? It is the fox! No.", ["Is it the fox?", "It is the fox!", "No."]),
        ("It grew by 3.5 percent a year.", ["It grew by 3.5 percent a year."]),
        ("no sentence at all", ["no sentence at all"]),
        ("", [""]),
        ("...", ["..."]),
        ("知らない人が書いた本を読みました", ["知らない人が書いた本を読みました"]),
        ("知らない人が書いた本を読みました。", ["知らない人が書いた本を読みました。"]),
        (
            "知らない人が書いた本を読みました。とても面白い本だったと思います。",
            ["知らない人が書いた本を読みました。", "とても面白い本だったと思います。"],
        ),
        ("هل هذا هو الكتاب الجديد؟ نعم هذا هو الكتاب.", ["هل هذا هو الكتاب الجديد؟", "نعم هذا هو الكتاب."]),
        ("यह एक बहुत अच्छी किताब है। वह एक घर है।", ["यह एक बहुत अच्छी किताब है।", "वह एक घर है।"]),
    ],
)
def test_text_is_split_into_sentences(text, expected):
    assert sentences(text) == expected


@given(ANY_TEXT)
def test_sentences_add_up_to_the_text(text):
    pieces = sentences(text)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(pieces) or not text.strip()


# -- Queries


def test_styles_extract_different_parts():
    assert extract(FAUST, "title", "question", "keywords") == [
        "Faust",
        "Goethe wrote a tragedy in two parts.",
        "faust goethe sells gretchen dies",
    ]


def test_a_missing_title_is_replaced_by_the_first_sentence():
    assert extract(FAUST | {"title": ""}, "title") == ["Goethe wrote a tragedy in two parts."]


def test_a_claim_is_any_sentence_but_the_first():
    claims = {extract(FAUST, "claim", seed=seed)[0] for seed in range(20)}
    assert claims == {"Faust sells his soul to the devil.", "Gretchen dies in the dungeon."}
    assert extract(document_of("Only one sentence."), "claim") == ["Only one sentence."]


def test_a_claim_is_part_of_a_long_sentence():
    words = [f"w{n}" for n in range(40)]
    claims = {extract(document_of(" ".join(words)), "claim", seed=seed)[0] for seed in range(10)}
    assert len(claims) > 1
    for claim in claims:
        assert len(claim.split()) == 12
        assert claim in " ".join(words)


@pytest.mark.parametrize(
    "text",
    [
        "知らない人が書いた本を読みました。",
        "知らない人が書いた本を読みました。とても面白い本だったと思います。",
        "如何删除软件包及其所有的配置文件？",
        "การลบแพ็กเกจพร้อมการตั้งค่า",
        "كيف أزيل حزمة مع كل إعداداتها؟",
        "x",
    ],
)
def test_claims_are_never_empty(text):
    for seed in range(10):
        (claim,) = extract(document_of(text), "claim", seed=seed)
        assert claim
        assert claim in text


def test_keywords_are_words_that_other_documents_lack():
    (keywords,) = extract(document_of("aa bb cc dd ee ff gg hh"), "keywords", others=[document_of("aa bb cc")] * 5)
    assert keywords == "dd ee ff gg hh"


def test_numbers_and_single_letters_are_not_keywords():
    assert extract(document_of("a 12 345 fox"), "keywords") == ["fox"]
    assert extract(document_of("1 2 3"), "keywords") == [""]


@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=4))
def test_every_document_has_queries(texts):
    documents = [{"_id": str(n), "title": title, "text": text} for n, (title, text) in enumerate(texts)]
    generator = ExtractiveGenerator(documents)
    requests = [QueryRequest(document, style, "und") for document in documents for style in STYLES]
    queries = generator.generate(requests)
    assert len(queries) == len(requests)
    assert all(isinstance(query, str) for query in queries)


@pytest.mark.slow
def test_a_document_of_a_million_characters_has_queries():
    document = document_of("fox hen " * 130_000)
    assert extract(document, "keywords") == ["fox hen"]
    assert extract(document, "claim")[0] in (("fox hen " * 6).strip(), ("hen fox " * 6).strip())


def test_draws_depend_on_seed_and_document_alone():
    documents = [
        document | {"text": f"{document['text']} {document['title']}. {FAUST['text']}"}
        for document in make_documents(12)
    ]
    requests = [QueryRequest(document, "claim", "en") for document in documents]
    expected = ExtractiveGenerator(documents).generate(requests)
    state = random.getstate()
    assert ExtractiveGenerator(documents[::-1]).generate(requests[::-1]) == expected[::-1]
    assert ExtractiveGenerator(documents[:1]).generate(requests[:1]) == expected[:1]
    assert random.getstate() == state
    assert ExtractiveGenerator(documents, 1).generate(requests) != expected


def test_keywords_do_not_depend_on_the_order_of_documents():
    documents = make_documents(12)
    requests = [QueryRequest(document, "keywords", "en") for document in documents]
    assert ExtractiveGenerator(documents).generate(requests) == ExtractiveGenerator(documents[::-1]).generate(requests)


def test_the_identity_covers_documents_and_seed():
    documents = make_documents(4)
    identity = ExtractiveGenerator(documents).identity
    assert ExtractiveGenerator(documents[::-1]).identity == identity
    assert ExtractiveGenerator(documents, 1).identity != identity
    assert ExtractiveGenerator(documents[1:]).identity != identity
    documents[0]["text"] += " It was seen again."
    assert ExtractiveGenerator(documents).identity != identity


# -- Copies


@pytest.mark.parametrize(
    ("query", "title", "text"),
    [
        ("Faust", "", FAUST["text"].replace("Faust ", "")),
        ("parts", "Faust", FAUST["text"].replace("parts", "")),
        ("part", "Faust", FAUST["text"]),
        ("Gretchen dies in the dungeon.", "Faust", FAUST["text"].removesuffix(" Gretchen dies in the dungeon.")),
        ("Faust sells his soul", "Faust", FAUST["text"].replace("Faust sells his soul ", "")),
        # Not a verbatim copy.
        ("faust", "Faust", FAUST["text"]),
        ("Goethe soul", "Faust", FAUST["text"]),
        ("Faust?", "Faust", FAUST["text"]),
        (" ", "Faust", FAUST["text"]),
    ],
)
def test_the_first_verbatim_copy_is_removed(query, title, text):
    assert without_copy(FAUST, query) == {"_id": "faust", "title": title, "text": text}


@pytest.mark.parametrize(("title", "text"), [("", "One fox."), ("One fox.", ""), ("The hen", "One fox. A bee.")])
def test_there_is_no_document_where_hardly_anything_is_left(title, text):
    assert without_copy(document_of(text, title), "One fox.") is None


@pytest.mark.parametrize("index", range(3))
def test_copies_are_removed_from_scripts_without_spaces(index):
    text = "今天天气很好，我们去公园玩。明天可能会下雨，所以要带伞。后天又是晴天，适合远足。"
    copied = sentences(text)[index]
    assert without_copy(document_of(text), copied)["text"].replace(" ", "") == text.replace(copied, "")


@pytest.mark.parametrize("text", ["你好。 这是一个很长的句子，里面有很多字。", "Yes. It is a fox, and a hen. No."])
def test_sentences_are_verbatim(text):
    assert all(sentence in text for sentence in sentences(text))


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_removal_only_shortens(title, text, query):
    rest = without_copy(document_of(text, title), query) or document_of("")
    assert len(rest["title"]) <= len(title)
    assert len(rest["text"]) <= len(text)
    assert rest == document_of(text, title) or any(query.strip() in field for field in (title, text))


@pytest.mark.parametrize("style", ["title", "question", "claim"])
def test_queries_of_these_styles_are_verbatim_copies(style):
    assert without_copy(FAUST, extract(FAUST, style)[0]) != FAUST
