import pytest

from modeling_querit.serving.settings import TOKEN_VARIABLE, ServerSettings, read_token, served_name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_documents", 0),
        ("max_chars", -1),
        ("max_queue", 0),
        ("batch_tokens", 0),
        ("cache_mb", -1),
        ("port", 70_000),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_option(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {value}"):
        ServerSettings(**{name: value})


def test_short_tokens_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="fewer than 8 characters") as error:
        ServerSettings(token="hunter2")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("host", "is_local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)]
)
def test_which_addresses_are_local(host, is_local):
    assert ServerSettings(host=host).is_local is is_local


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert read_token(None) == "from-environment"
    path = tmp_path / "token"
    path.write_text("from-file\n")
    assert read_token(path) == "from-file"


@pytest.mark.parametrize("text", ["", "\n", "two words", "two\nlines", "ümlaut-token"])
def test_what_is_no_token_is_refused_by_its_source(tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"token holds no token|token is empty"):
        read_token(path)


def test_names_hold_no_path(tmp_path, monkeypatch):
    (tmp_path / "law").mkdir()
    monkeypatch.chdir(tmp_path / "law")
    assert served_name(".") == "law"
    assert served_name(str(tmp_path / "law") + "/") == "law"
    assert served_name("me/reranker") == "me/reranker"
