import errno
import io
import json
import logging
import math
import os
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit import console
from modeling_querit.ranking_querit import RankedDocument

RANKING = [RankedDocument(1, 0.5, {"title": "Fox", "text": "red\n[bold]"}), RankedDocument(0, -0.25, "ü" * 200)]


def test_a_ranking_as_json(capsys):
    console.print_ranking_json("mini", RANKING)
    assert json.loads(capsys.readouterr().out) == {
        "model": "mini",
        "results": [
            {"index": 1, "score": 0.5, "document": {"title": "Fox", "text": "red\n[bold]"}},
            {"index": 0, "score": -0.25, "document": "ü" * 200},
        ],
    }


def test_a_ranking_as_a_table(capsys):
    console.print_ranking("which [fox]", RANKING)
    title, header, first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert title == "which [fox]"
    assert header.split() == ["rank", "score", "index", "document"]
    assert first.split() == ["1", "+0.500", "1", "Fox", "red", "[bold]"]
    # Cut to one line.
    assert second.startswith("   2  -0.250      0  üüü")
    assert second.endswith("…")


@pytest.fixture
def fresh(monkeypatch):
    """As in a process where neither transformers nor torchao is imported yet."""
    for name in ("transformers", "torchao"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("config", "is_skipped"),
    [({"model_type": "querit"}, True), ({"quantization_config": {"quant_method": "torchao"}}, False), (None, False)],
)
def test_torchao_is_skipped_for_folders_that_do_not_need_it(fresh, monkeypatch, tmp_path, config, is_skipped):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    console.skip_torchao(str(tmp_path))
    assert ("torchao" in sys.modules) == is_skipped


def test_torchao_is_not_skipped_once_transformers_is_imported(monkeypatch):
    import transformers  # noqa: F401

    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torchao"})
    console.skip_torchao("mini")
    assert "torchao" not in sys.modules


HOSTILE = "x \x1b]0;T\x1b\\ \x1b[2J \x9b31m \x07\r\b \u202e\u2066 \u2028\ud800"


@pytest.fixture
def written(monkeypatch):
    """What is written to standard output, as bytes, by the name of its encoding."""

    def redirect(encoding):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding, write_through=True))
        return buffer

    return redirect


def test_control_characters_are_visible():
    assert console.printable(HOSTILE).isprintable()
    assert console.printable("a\tb\nc ü 日本 😀") == "a\tb\nc ü 日本 😀"
    assert console.printable("\x1b[2J") == "\\x1b[2J"


@given(st.text(st.characters()))
def test_lines_are_printable_whatever_they_hold(text):
    for line in console.printable(text).split("\n"):
        assert not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in line.replace("\t", ""))


def test_a_ranking_shows_no_control_characters(capsys):
    console.print_ranking(f"which\n{HOSTILE}", [RankedDocument(0, 0.5, HOSTILE)])
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252", "utf-16"])
def test_json_is_utf8_whatever_the_stream_is(written, encoding):
    buffer = written(encoding)
    documents = [{"text": f"ü 😀 {HOSTILE}", "x": math.nan, "y": [math.inf, {"z": -math.inf}]}]
    console.print_ranking_json("mini", [RankedDocument(0, 0.5, document) for document in documents])
    text = buffer.getvalue().decode("utf-8")
    assert "ü 😀" in text
    assert all(line.isprintable() for line in text.splitlines())

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    (result,) = json.loads(text, parse_constant=refuse)["results"]
    assert result["document"] == {"text": f"ü 😀 {HOSTILE}", "x": None, "y": [None, {"z": None}]}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_lines_are_escaped_as_far_as_the_stream_needs_it(written, encoding):
    buffer = written(encoding)
    console.say("ü 😀 \x1b")
    text = buffer.getvalue().decode(encoding)
    assert text in ("ü 😀 \\x1b\n", "ü \\U0001f600 \\x1b\n", "\\xfc \\U0001f600 \\x1b\n")


def test_a_long_message_keeps_its_beginning_and_its_end(capsys):
    console.say_error(f"config.yaml: model is '{'x' * 5000}\n': choose mini.")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("querit: config.yaml: model is 'xxx")
    assert line.endswith("xxx ': choose mini.")
    assert len(line) < 300
    assert console.one_line("short\n and\tplain") == "short and plain"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOENT, "rows.jsonl does not exist: check the path."),
        (errno.EACCES, "rows.jsonl may not be read or written by this user: change its permissions, or name another."),
        (errno.EISDIR, f"rows.jsonl: {os.strerror(errno.EISDIR)}."),
    ],
)
def test_errors_of_the_operating_system_begin_with_the_file(capsys, code, advice):
    console.say_error(OSError(code, os.strerror(code), "rows.jsonl"))
    assert capsys.readouterr().err == f"querit: {advice}\n"


def test_logs_hold_no_control_characters(caplog):
    logger = logging.getLogger("modeling_querit.test")
    with console.safe_output():
        logger.warning("%s has %d", HOSTILE, 3)
    logger.warning("%s", "\x1b")
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"{console.printable(HOSTILE)} has 3"
    assert second == "\x1b"


def test_a_table_of_results_has_no_control_characters(capsys):
    console.print_evaluation([("a\x1b[2Jb (2 queries)", "", "", "", ""), ("  mini", "1.00", "", "", "")], ["x\x07"])
    out = capsys.readouterr().out
    assert "a\\x1b[2Jb (2 queries)" in out
    assert "mini" in out
    assert out.endswith("x\\x07\n")
    assert "\x1b" not in out
