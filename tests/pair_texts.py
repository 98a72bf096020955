"""Texts on which tokenizers differ, as strategies of hypothesis, and how tests encode them."""

from hypothesis import strategies as st

ANY_TEXT = st.text(max_size=40)
# Characters on which tokenizers differ: several scripts, marks, digits, spaces, an emoji of several characters.
VARIED_TEXT = st.text(alphabet="ab Zé\u0301中文かن🙂\u200d1 2;:?.)(\n\t\u00a0\u2028", max_size=40)
WORDS = st.lists(st.sampled_from(["the", "book", "f(x)", "who?", "1831", "知らない", "...", "é"]), max_size=30).map(
    " ".join
)
TEXT = st.one_of(ANY_TEXT, VARIED_TEXT, WORDS)


def holds_a_token_name(tokenizer, *texts):
    return any(str(token) in text for token in tokenizer.get_added_vocab() for text in texts)


def encode(processor, query, document, instruction=None, max_length=None):
    return processor.encode([query], [document], instruction, max_length)[0]


def plain_ids(processor, text):
    return processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
