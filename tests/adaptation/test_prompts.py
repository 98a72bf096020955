import pytest

from modeling_querit.adaptation.prompts import (
    STYLES,
    Request,
    completion_of,
    instruction_of,
    messages_of,
    read_examples,
)

FAUST = {"_id": "faust", "title": "Faust", "text": "Goethe wrote it."}
BARE = {"_id": "bare", "title": "", "text": "A fox ${style} $5 {x}."}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_asked_for_in_its_own_words(style):
    said, field = STYLES[style]
    instruction = instruction_of(Request(FAUST, style, "de"))
    assert said in instruction
    assert f"nothing but the {field.lower()}, on one line, in German." in instruction
    assert "$" not in instruction


@pytest.mark.parametrize("language", ["und", "tlh", ""])
def test_a_language_without_a_name_is_not_asked_for(language):
    assert instruction_of(Request(FAUST, "title", language)).endswith("nothing but the title, on one line.")


def test_an_unknown_style():
    with pytest.raises(ValueError, match="style is 'haiku': choose from question, keywords, claim, title"):
        Request(FAUST, "haiku", "en")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("${field}$language", "title, in English"),
        ("Costs $5, $$7 and ${other}: $field", "Costs $5, $7 and ${other}: title"),
        ("", ""),
    ],
)
def test_templates(template, expected):
    assert instruction_of(Request(FAUST, "title", "en"), template) == expected


def test_messages():
    (message,) = messages_of(Request(FAUST, "title", "en"), "Write a $field.")
    assert message == {"role": "user", "content": "Write a title.\n\nDocument:\nTitle: Faust\nGoethe wrote it."}
    (message,) = messages_of(Request(BARE, "title", "en", ("red fox", "hen")), "Write.")
    assert message["content"] == (
        "Write.\n\nWhat people search this collection for:\n- red fox\n- hen\n\nDocument:\nA fox ${style} $5 {x}."
    )


def test_a_text_to_continue():
    assert completion_of(Request(FAUST, "keywords", "en")) == "Document: Faust. Goethe wrote it.\nSearch:"
    shots = [({"title": "", "text": "A hen."}, "Who lays eggs?")]
    assert completion_of(Request(BARE, "question", "en", ("red fox",)), shots) == (
        "What people search for:\n- red fox\n\n"
        "Document: A hen.\nQuestion: Who lays eggs?\n\n"
        "Document: A fox ${style} $5 {x}.\nQuestion:"
    )


def test_real_queries_of_a_file(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_bytes("red fox\r\n\n  Füchse \n".encode())
    assert read_examples(path) == ["red fox", "Füchse"]
    path.write_bytes("Füchse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"queries.txt: .*save it as UTF-8"):
        read_examples(path)
