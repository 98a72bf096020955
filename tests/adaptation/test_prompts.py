import pytest

from modeling_querit.adaptation.prompts import (
    STYLES,
    QueryRequest,
    completion_of,
    instruction_of,
    messages_of,
    read_examples,
)

FAUST = {"_id": "faust", "title": "Faust", "text": "Goethe wrote it."}
BARE = {"_id": "bare", "title": "", "text": "A fox ${style} $5 {x}."}


@pytest.mark.parametrize("style", STYLES)
def test_an_instruction_describes_its_style(style):
    said, field = STYLES[style]
    instruction = instruction_of(QueryRequest(FAUST, style, "de"))
    assert said in instruction
    assert f"nothing but the {field.lower()}, on one line, in German." in instruction
    assert "$" not in instruction


@pytest.mark.parametrize("language", ["und", "tlh", ""])
def test_a_language_without_a_name_is_left_out(language):
    assert instruction_of(QueryRequest(FAUST, "title", language)).endswith("nothing but the title, on one line.")


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style is 'haiku': choose from question, keywords, claim, title"):
        QueryRequest(FAUST, "haiku", "en")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("${field}$language", "title, in English"),
        ("Costs $5, $$7 and ${other}: $field", "Costs $5, $7 and ${other}: title"),
        ("", ""),
    ],
)
def test_templates_are_filled_in(template, expected):
    assert instruction_of(QueryRequest(FAUST, "title", "en"), template) == expected


def test_messages_hold_instruction_examples_and_document():
    (message,) = messages_of(QueryRequest(FAUST, "title", "en"), "Write a $field.")
    assert message == {"role": "user", "content": "Write a title.\n\nDocument:\nTitle: Faust\nGoethe wrote it."}
    (message,) = messages_of(QueryRequest(BARE, "title", "en", ("red fox", "hen")), "Write.")
    assert message["content"] == (
        "Write.\n\nWhat people search this collection for:\n- red fox\n- hen\n\nDocument:\nA fox ${style} $5 {x}."
    )


def test_a_completion_prompt_has_shots_and_examples():
    assert completion_of(QueryRequest(FAUST, "keywords", "en")) == "Document: Faust. Goethe wrote it.\nSearch:"
    shots = [({"title": "", "text": "A hen."}, "Who lays eggs?")]
    assert completion_of(QueryRequest(BARE, "question", "en", ("red fox",)), shots) == (
        "What people search for:\n- red fox\n\n"
        "Document: A hen.\nQuestion: Who lays eggs?\n\n"
        "Document: A fox ${style} $5 {x}.\nQuestion:"
    )


def test_examples_are_read_from_a_file(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_bytes("red fox\r\n\n  Füchse \n".encode())
    assert read_examples(path) == ["red fox", "Füchse"]
    path.write_bytes("Füchse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"queries.txt, line 1: .*save it as UTF-8"):
        read_examples(path)
