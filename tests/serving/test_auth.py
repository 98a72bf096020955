import pytest

from modeling_querit.serving.auth import is_authorized


@pytest.mark.parametrize("header", [b"Bearer secret-token", b"bearer secret-token", b"Bearer  secret-token "])
def test_the_token_opens(header):
    assert is_authorized(header, "secret-token")


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer secret", b"Basic secret-token", b"secret-token", b"Bearer \xff\xfe"]
)
def test_nothing_else_does(header):
    assert not is_authorized(header, "secret-token")


def test_without_a_token_everybody_may_pass():
    assert is_authorized(None, None)
