"""Copies of tokenizers, and the first tokens of long texts: those of the whole text, for tokenizers of every kind."""

import json
import time

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from modeling_querit.tokenizer_backend_querit import copy_backend, first_size, first_tokens, reach

CORPUS = [
    "who wrote the book about the content? the judge wrote it, in a novel.; aa aaa aaaa",
    "知らない人が書いた本",
] * 20
LONG_TOKEN = "=" * 3000


def byte_level(*added):
    backend = tiny.make_tokenizer().backend_tokenizer
    backend.add_tokens(list(added))
    return backend


def one_word_bpe():
    """As Gemma's: the whole text is one word, with byte fallback."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False))
    return backend


def unigram(split):
    """As those of sentencepiece, whose normalizers shrink runs of spaces and compose characters."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    trainer = trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_pieces():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def looking_far_ahead(pattern):
    backend = byte_level()
    backend.normalizer = normalizers.Replace(Regex(pattern), "novel")
    return backend


MADE = {
    "byte level": byte_level,
    "long added token": lambda: byte_level(LONG_TOKEN),
    "added token with the spaces before it": lambda: byte_level(AddedToken("<ret>", lstrip=True, rstrip=True)),
    "one word": one_word_bpe,
    "unigram": lambda: unigram(True),
    "unigram of one word": lambda: unigram(False),
    "word pieces": word_pieces,
    "long pattern": lambda: looking_far_ahead("a.*!!"),
    "lookahead": lambda: looking_far_ahead("a(?=[^!]*!!)"),
}
PIECES = st.sampled_from(
    [
        *("the book ", "a", " ", "  ", "\n", "\t \n", "aa", "知", "知ら、", "🙂", "=", "!!", "<ret>", "ab-", "1", "ﬁ"),
        *("\u0301", "\u0323", "e\u0301\u0323", "\u1100\u1161", "क्षि", "\u200d", "\x00"),
    ]
)
TEXTS = st.lists(st.tuples(PIECES, st.sampled_from([1, 2, 3, 50, 700, 5000])), min_size=1, max_size=7).map(
    lambda runs: "".join(piece * count for piece, count in runs)[:25_000]
)


@pytest.fixture(
    scope="module", params=[*MADE, *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek", "qwen"))]
)
def backend(request):
    if request.param in MADE:
        return MADE[request.param]()
    return request.getfixturevalue(f"{request.param}_tokenizer").backend_tokenizer


@settings(max_examples=20)
@given(text=TEXTS, limit=st.sampled_from([1, 7, 60, 500, 1200]))
def test_first_tokens_are_those_of_the_whole_text(backend, text, limit):
    whole = backend.encode(text, add_special_tokens=False)
    first = first_tokens(backend, text, limit, reach(backend))
    assert first.ids[:limit] == whole.ids[:limit]
    assert first.offsets[:limit] == whole.offsets[:limit]
    assert len(first.ids) > limit or first.ids == whole.ids


@pytest.mark.parametrize(
    ("name", "beginning", "end"),
    [
        ("long added token", "the book " * 600 + "=", LONG_TOKEN + " the book" * 2000),
        ("added token with the spaces before it", "the book" + " " * 20_000, "<ret> the book" * 2000),
        ("unigram", "the book" + "\u0301" * 20_000, "\u0323 the book" * 2000),
        ("long pattern", "a book " * 4000, "!!" + "the book " * 2000),
        ("lookahead", "a book " * 4000, "!!" + "the book " * 2000),
        ("byte level", "a" * 30_001, " the book" * 2000),
        ("unigram of one word", "a" * 30_001, " the book" * 2000),
    ],
)
def test_what_comes_far_behind_is_seen(name, beginning, end):
    backend = MADE[name]()
    for limit in (500, 1100, 1300):
        whole = backend.encode(beginning + end, add_special_tokens=False).ids
        assert first_tokens(backend, beginning + end, limit, reach(backend)).ids[:limit] == whole[:limit]


@pytest.mark.slow
def test_a_document_of_10_megabytes(deepseek_tokenizer, qwen_tokenizer):
    for tokenizer in (deepseek_tokenizer, qwen_tokenizer):
        backend = tokenizer.backend_tokenizer
        for words in ("The judge wrote a book, in 1831. ", "知らない人が書いた本、"):
            text = words * (10_000_000 // len(words))
            start = time.process_time()
            first = first_tokens(backend, text, 4096, reach(backend))
            assert time.process_time() - start < 1
            assert 4096 < len(first.ids) < 100_000


def test_a_copy_is_the_same_tokenizer(backend):
    copied = copy_backend(backend)
    contents = [json.loads(each.to_str()) for each in (backend, copied)]
    for content in contents:
        for name in ("post_processor", "truncation", "padding"):
            del content[name]
    assert contents[0] == contents[1]
    copied.add_tokens(["a new token"])
    copied.enable_truncation(3)
    copied.enable_padding(length=5)
    assert backend.token_to_id("a new token") is None
    assert backend.truncation is None
    assert backend.padding is None


@pytest.mark.parametrize("limit", [1, 256, 4096])
def test_shorter_texts_are_whole(limit):
    backend = byte_level()
    text = "the book " * (2 * first_size(limit) // 9)
    assert first_tokens(backend, text, limit, 0).ids == backend.encode(text).ids
