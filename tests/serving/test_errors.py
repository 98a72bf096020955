import json

from modeling_querit.serving.errors import error_response, validation_sentence


def test_answers_have_a_message_and_a_type():
    response = error_response(429, "Später.", {"Retry-After": "3"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert json.loads(response.body) == {"error": {"message": "Später.", "type": "RateLimitError", "code": 429}}


def test_the_place_is_named_and_what_it_holds_is_not():
    error = {"loc": ("body", "documents", 3, "text"), "msg": "Input should be a valid string", "input": "secret"}
    assert validation_sentence([error]) == "documents[3].text: input should be a valid string."


def test_names_of_unknown_fields_are_shortened_and_printable():
    error = {"loc": ("body", "a\n\ud800" + "b" * 100), "msg": "Extra", "type": "extra_forbidden"}
    assert validation_sentence([error]) == f"a??{'b' * 37}: there is no such field."


def test_types_that_a_field_may_have_are_no_part_of_its_place():
    errors = [
        {"loc": ("body", "text_2", "function-after[_check_document(), any]"), "msg": "A document"},
        {"loc": ("body", "text_2", "list[function-after[_check_document(), any]]", 1), "msg": "A text"},
        {"loc": ("body", "queries", "list[str]", 1, "more"), "msg": "Another field"},
    ]
    assert validation_sentence(errors) == "text_2[1]: a text."
    assert validation_sentence([{"loc": ("body", "str"), "type": "missing", "msg": ""}]) == "str is missing."
