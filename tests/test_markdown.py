import pytest

from modeling_querit.markdown import code, escape


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a|b\nc", r"a\|b c"),
        ("![x](http://a/b.png)", r"!\[x\](http://a/b.png)"),
        ("`code` **bold** _it_ ~~no~~ $x$ # h", r"\`code\` \*\*bold\*\* \_it\_ \~\~no\~\~ \$x\$ # h"),
        ("back\\slash &amp;", r"back\\slash &amp;amp;"),
        ("\x1b[2J\x9b\u202e", r"\\x1b\[2J\\x9b\\u202e"),
        (7, "7"),
        ("# no heading", r"\# no heading"),
        ("liveqa_med (short 3)", "liveqa_med (short 3)"),
        ("größe 日本", "größe 日本"),
    ],
)
def test_markup_is_text(text, escaped):
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("text", "as_code"),
    [("me/model", "`me/model`"), ("a`b", "``a`b``"), ("`a``b", "``` `a``b ```"), ("a\n# b\x1b", r"`a # b\x1b`")],
)
def test_inline_code_is_fenced(text, as_code):
    assert code(text) == as_code
