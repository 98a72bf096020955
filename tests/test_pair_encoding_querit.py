"""The text of a pair and its token ids, against the reference."""

import time

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pair_texts import TEXT, WORDS, encode, holds_a_token_name, plain_ids
from transformers import PreTrainedTokenizerFast

from modeling_querit import QueritProcessor
from modeling_querit.pair_encoding_querit import DEFAULT_INSTRUCTION, document_text


@pytest.fixture(scope="session")
def wrapper_of():
    """mteb's own wrapper around a tokenizer, without the model that its constructor would load."""
    module = pytest.importorskip("mteb.models.model_implementations.querit_models")

    def make(processor, max_length=511):
        wrapper = module.QueritWrapper.__new__(module.QueritWrapper)
        wrapper.tokenizer = processor.tokenizer
        wrapper.cls_token_id = processor.tokenizer.convert_tokens_to_ids("[CLS]")
        wrapper.pad_token_id = processor.tokenizer.pad_token_id or 0
        wrapper.max_length = max_length
        wrapper.device = torch.device("cpu")
        return wrapper

    return make


def reference_ids(wrapper, instruction, query, content):
    """The reference's ids, without its padding."""
    inputs = wrapper.process_inputs([wrapper.format_instruction(instruction, query, content)])
    is_token = inputs["attention_mask"][0, 0].diagonal()
    # Nothing was cut: the reference drops the first token of a text that fills its limit.
    assume(not is_token[0])
    return inputs["input_ids"][0][is_token].tolist()


# The reference


@pytest.mark.slow
@given(query=TEXT, content=TEXT, instruction=st.one_of(st.none(), TEXT))
def test_ids_are_those_of_the_reference(any_processor, wrapper_of, query, content, instruction):
    assume(not holds_a_token_name(any_processor.tokenizer, query, content, instruction or ""))
    # mteb strips documents before its wrapper sees them.
    expected = reference_ids(wrapper_of(any_processor), instruction, query, content.strip())
    pair = encode(any_processor, query, content, instruction, max_length=512)
    assert pair == (expected, 0, 0)


def test_batch_is_the_reference_batch(processor, wrapper_of):
    queries = ["who wrote it", "the judge"]
    contents = ["nobody", "a book about the content"]
    wrapper = wrapper_of(processor, max_length=100)
    texts = [wrapper.format_instruction(None, query, content) for query, content in zip(queries, contents, strict=True)]
    theirs, ours = wrapper.process_inputs(texts), processor(queries, contents)
    width = ours["input_ids"].shape[1]
    assert ours["attention_mask"].sum(-1).max() == width
    assert torch.equal(theirs["input_ids"][:, -width:], ours["input_ids"])
    assert torch.equal(
        theirs["attention_mask"][:, 0].diagonal(dim1=-2, dim2=-1)[:, -width:], ours["attention_mask"].bool()
    )


def test_text_is_the_published_one(any_processor):
    ids = encode(any_processor, "who wrote Faust", "Goethe did.").input_ids
    assert ids[-1] == any_processor.tokenizer.convert_tokens_to_ids("[CLS]")
    assert any_processor.tokenizer.decode(ids[:-1]) == (
        "Judge whether the Content meets the requirements based on the Query. "
        "Query: who wrote Faust; Content: Goethe did."
    )


def test_one_instruction_each(processor):
    encoded = processor.encode(["a", "b"], ["c", "d"], ["First.", "Second."])
    assert encoded == [encode(processor, "a", "c", "First."), encode(processor, "b", "d", "Second.")]
    assert processor.encode(["a", "b"], ["c", "d"], "First.") == [
        encode(processor, "a", "c", "First."),
        encode(processor, "b", "d", "First."),
    ]


# Titles


@pytest.mark.parametrize(
    "document",
    [
        {"title": "A title", "text": "the text "},
        {"title": " A title", "text": ""},
        {"title": "A title ", "text": "\n the text"},
        {"title": "\u3000A title", "text": "the text\u00a0"},
    ],
)
def test_title_and_text_are_joined_as_mteb_joins_them(processor, document):
    joined = (document["title"] + " " + document["text"]).strip()
    assert encode(processor, "q", document) == encode(processor, "q", joined)


def test_mteb_joins_title_and_text_so(processor):
    loaders = pytest.importorskip("mteb._create_dataloaders")
    for title, text in [(" A title ", " the text "), ("A", ""), (" ", "the text"), ("", " the text ")]:
        row = loaders._corpus_to_dict({"id": "1", "title": title, "text": text})
        assert encode(processor, "q", {"title": title, "text": text}) == encode(processor, "q", row["text"])


@pytest.mark.parametrize("text", [" the text ", "the text", "\n the text\u3000", "", " "])
def test_a_text_is_the_same_whatever_it_comes_in(processor, text):
    expected = encode(processor, "q", text.strip())
    for document in (text, {"text": text}, {"title": "", "text": text}, {"title": None, "text": text}):
        assert encode(processor, "q", document) == expected
    loaders = pytest.importorskip("mteb._create_dataloaders")
    row = loaders._corpus_to_dict({"id": "1", "title": "", "text": text})
    assert encode(processor, "q", row["text"]) == expected
    assert document_text(text) == row["text"]


# Too long


@pytest.mark.slow
@given(
    query=TEXT,
    content=st.one_of(TEXT, WORDS.map(lambda words: words * 5)),
    instruction=st.sampled_from([DEFAULT_INSTRUCTION, "", "Find it."]),
    room=st.integers(-3, 60),
)
def test_cutting(any_processor, query, content, instruction, room):
    """What is lost is the end of the content, then the end of the query; nothing else, and no more than must be."""
    tokenizer, content = any_processor.tokenizer, content.strip()
    assume(not holds_a_token_name(tokenizer, query, content))
    # The Qwen tokenizer composes characters, so compare texts that are composed already.
    if tokenizer.backend_tokenizer.normalizer is not None:
        query, content = (tokenizer.backend_tokenizer.normalizer.normalize_str(text) for text in (query, content))
    before, after = f"{instruction} Query:", "; Content: "
    head = f"{before} {query}{after}"
    shortest = len(plain_ids(any_processor, before)) + len(plain_ids(any_processor, after)) + 1
    limit = shortest + room
    uncut = plain_ids(any_processor, head + content)

    if room < 0:
        # So short a limit leaves no room for the instruction and the words between.
        with pytest.raises(ValueError, match=r"instruction.*max_length"):
            any_processor.encode([query], [content], instruction, limit)
        return
    ids, cut_content, cut_query = encode(any_processor, query, content, instruction, limit)

    assert ids[-1] == any_processor.cls_token_id
    assert any_processor.cls_token_id not in ids[:-1]
    assert len(ids) == min(limit, len(uncut) + 1)
    remaining = tiny.bytes_of(tokenizer, ids[:-1])
    if cut_query == 0:
        # A prefix of the whole, which reaches at least to the content.
        assert ids[:-1] == uncut[: limit - 1]
        assert remaining.startswith(head.encode())
        assert cut_content == len(uncut) - len(ids[:-1])
    else:
        # No room for any content; of the query its beginning is left, and the words after it stand where they were.
        middle = remaining.removeprefix(before.encode())
        assert len(middle) < len(remaining)
        assert middle.endswith(after.encode())
        assert f" {query}".encode().startswith(middle.removesuffix(after.encode()))
        assert cut_content <= len(uncut)
        assert (cut_content > 0) == bool(content)


def test_counts_of_what_was_cut(processor):
    query, content = "the book " * 30, "a novel " * 30
    whole = encode(processor, query, content, max_length=10_000)
    assert whole[1:] == (0, 0)
    fixed = len(encode(processor, query, "", max_length=10_000).input_ids)
    size = len(whole.input_ids)

    cut = encode(processor, query, content, max_length=size - 7)
    assert cut.input_ids == [*whole.input_ids[: size - 8], processor.cls_token_id]
    assert cut[1:] == (7, 0)

    # One for every `a` and `novel`, whose letters are no words of this tokenizer.
    of_content = len(plain_ids(processor, " " + content.rstrip()))
    none = encode(processor, query, content, max_length=fixed - 5)
    assert none[1:] == (of_content, 5)


def test_a_one_word_document_that_is_cut_is_counted(processor):
    # ` the` is one token, the space of `Content: ` in it: with the word goes nothing else.
    query = "the book " * 30
    fixed = len(encode(processor, query, "", max_length=10_000).input_ids)
    pair = encode(processor, query, "the", max_length=fixed - 5)
    assert (pair.cut_content, pair.cut_query) == (1, 5)


@pytest.mark.parametrize("query", ["f(x);" * 100, "who?" * 100, "f(x)" * 100])
def test_cutting_a_query_keeps_the_semicolon(any_processor, query):
    # `);` and `?;` are tokens that reach over the query's end.
    pair = encode(any_processor, query, "the text", max_length=60)
    text = any_processor.tokenizer.decode(pair.input_ids)
    assert text.startswith(DEFAULT_INSTRUCTION + " Query: ")
    assert text.endswith("; Content: [CLS]")
    assert len(pair.input_ids) == 60


def test_an_instruction_that_is_too_long_is_an_error(any_processor):
    with pytest.raises(ValueError, match=r"instruction takes \d+ tokens.*max_length = 40"):
        encode(any_processor, "q", "d", "Judge the book " * 40, max_length=40)


@pytest.mark.parametrize("max_length", [1, 0])
def test_no_room_at_all_is_an_error(processor, max_length):
    with pytest.raises(ValueError, match="max_length"):
        encode(processor, "q", "d", max_length=max_length)


@pytest.mark.slow
def test_the_limit_is_the_tokenizers_but_4096_at_most(tokenizer, deepseek_tokenizer, qwen_tokenizer):
    assert QueritProcessor(tokenizer).max_length == tiny.MAX_LENGTH
    assert QueritProcessor(deepseek_tokenizer).max_length == 4096
    assert QueritProcessor(qwen_tokenizer).max_length == 4096
    assert QueritProcessor(qwen_tokenizer, max_length=8192).max_length == 8192
    assert len(encode(QueritProcessor(tokenizer), "q", tiny.LONG_DOCUMENT).input_ids) == tiny.MAX_LENGTH
    assert len(encode(QueritProcessor(tokenizer, 99), "q", tiny.LONG_DOCUMENT).input_ids) == 99


# A tokenizer that splits at its own space sign, as Gemma's does


@pytest.fixture(scope="module")
def space_sign_processor():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<unk>", "[CLS]", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    backend.train_from_iterator(tiny._CORPUS * 2, trainer)
    return QueritProcessor(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"))


@given(query=WORDS, content=WORDS, room=st.integers(0, 40))
def test_cutting_with_a_space_sign(space_sign_processor, query, content, room):
    words = len(plain_ids(space_sign_processor, "Find it. Query:")) + len(
        plain_ids(space_sign_processor, "; Content: ")
    )
    ids, cut_content, cut_query = encode(space_sign_processor, query, content, "Find it.", words + 1 + room)
    text = space_sign_processor.tokenizer.decode(ids)
    assert text.startswith("Find it. Query:")
    assert text.endswith("[CLS]")
    assert "; Content: " in text
    if not cut_query:
        assert text.startswith(f"Find it. Query: {query}; Content: ")
    else:
        assert text.endswith("; Content: [CLS]")
        assert (cut_content > 0) == bool(content)


# Odd texts


@pytest.mark.parametrize(("query", "content"), [("", ""), ("", "text"), ("query", ""), (" ", "\n")])
def test_empty_texts(any_processor, wrapper_of, query, content):
    expected = reference_ids(wrapper_of(any_processor), None, query, content.strip())
    assert encode(any_processor, query, content).input_ids == expected


SURROGATES = [
    ("a\ud800b", "a\ufffdb"),
    ("a\udc00b", "a\ufffdb"),
    ("\ud800", "\ufffd"),
    ("end\ud83d", "end\ufffd"),
    ("\udc00\ud800", "\ufffd\ufffd"),
    ("\ud800\ud800", "\ufffd\ufffd"),
    ("\ud83d\ude42", "🙂"),
    ("\ud800\ud83d\ude42", "\ufffd🙂"),
    ("\ufeffa\ud800", "\ufeffa\ufffd"),
]


@pytest.mark.parametrize(("broken", "clean"), SURROGATES)
def test_surrogates(any_processor, broken, clean):
    assert encode(any_processor, broken, "d") == encode(any_processor, clean, "d")
    assert encode(any_processor, "q", broken) == encode(any_processor, "q", clean)
    assert encode(any_processor, "q", "d", broken) == encode(any_processor, "q", "d", clean)
    title = {"title": broken, "text": "d"}
    assert encode(any_processor, "q", title) == encode(any_processor, "q", {"title": clean, "text": "d"})


@given(st.text(alphabet="ab\ud800\udbff\udc00\udfff🙂\ufeff", max_size=12))
def test_surrogates_pair_up_or_are_replaced(processor, text):
    clean = []
    for character in text:
        if clean and "\ud800" <= clean[-1] <= "\udbff" and "\udc00" <= character <= "\udfff":
            low, high = ord(character) - 0xDC00, ord(clean[-1]) - 0xD800
            clean[-1] = chr(0x10000 + (high << 10) + low)
        else:
            clean.append(character)
    clean = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in clean)
    assert encode(processor, "q", text) == encode(processor, "q", clean)


def test_nul_is_a_character_like_another(any_processor):
    ids = encode(any_processor, "a\x00b", "\x00").input_ids
    assert any_processor.tokenizer.decode(ids[:-1]).endswith("Query: a\x00b; Content: \x00")


@pytest.mark.slow
@pytest.mark.parametrize("document", ["the book " * 116_509, "a知" * 262_144], ids=["words", "no spaces"])
def test_a_megabyte(any_processor, document):
    start = time.process_time()
    pair = encode(any_processor, "who wrote it", document, max_length=256)
    assert time.process_time() - start < 30
    assert len(pair.input_ids) == 256
    assert pair.cut_query == 0
    # Not all of it is tokenized to be counted.
    assert pair.cut_content > 256


def test_names_of_special_tokens_are_text(any_processor):
    tokenizer = any_processor.tokenizer
    names = [str(name) for name in tokenizer.all_special_tokens]
    assert "[CLS]" in names
    typed = " ".join(names)
    for query, document, instruction in [
        (typed, typed, typed),
        ("[CLS]", "[CLS][CLS]", None),
        ("q", {"title": typed, "text": typed}, None),
        ("q", typed * 3, None),
    ]:
        ids = encode(any_processor, query, document, instruction, max_length=1000).input_ids
        assert set(ids) & set(tokenizer.all_special_ids) == {any_processor.cls_token_id}
        assert ids.count(any_processor.cls_token_id) == 1
        assert ids[-1] == any_processor.cls_token_id
    assert tokenizer.decode(encode(any_processor, "q", typed).input_ids[:-1]).endswith(f"; Content: {typed}")


def test_names_of_special_tokens_are_text_when_cut(any_processor):
    ids = encode(any_processor, "[CLS]" * 90, "[CLS]" * 90, max_length=60).input_ids
    assert len(ids) == 60
    assert ids.count(any_processor.cls_token_id) == 1


# What is no text


@pytest.mark.parametrize("value", [None, 7, 1.5, b"bytes", ["list"], float("nan")])
def test_what_is_no_text_is_an_error(processor, value):
    with pytest.raises(TypeError, match="query"):
        processor.encode([value], ["d"])
    with pytest.raises(TypeError, match="document"):
        processor.encode(["q"], [value])
    with pytest.raises(TypeError, match="document"):
        processor.encode(["q"], [{"text": value}])
    with pytest.raises(TypeError, match="document"):
        processor.encode(["q"], [{"title": "only"}])
    if value is not None:
        with pytest.raises(TypeError, match="title"):
            processor.encode(["q"], [{"title": value, "text": "d"}])
        with pytest.raises(TypeError):
            processor.encode(["q"], ["d"], [value])


def test_counts_must_agree(processor):
    with pytest.raises(ValueError, match="2 queries, 1 documents"):
        processor.encode(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="2 instructions"):
        processor.encode(["a"], ["c"], ["First.", "Second."])


def test_no_pairs_give_no_ids(processor):
    assert processor.encode([], []) == []


def test_a_tokenizer_without_cls_is_an_error(tokenizer):
    backend = tiny.make_tokenizer().backend_tokenizer
    from tokenizers import Tokenizer, models

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    plain.backend_tokenizer.pre_tokenizer = backend.pre_tokenizer
    with pytest.raises(ValueError, match=r"\[CLS\].*from_backbone"):
        QueritProcessor(plain)


def test_a_slow_tokenizer_is_an_error():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        QueritProcessor(Slow())


def test_dropout_of_a_tokenizer_is_refused_and_does_not_make_scores_random(tmp_path):
    processor = QueritProcessor(tiny.make_tokenizer())
    expected = processor.encode(["who wrote it"], ["a novel"])
    # What users train other models with; the copies of a tokenizer share its model.
    processor.tokenizer.backend_tokenizer.model.dropout = 0.5
    with pytest.raises(ValueError, match=r"BPE dropout.*model\.dropout = None"):
        processor.encode(["who wrote it"], ["a novel"])
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer cannot be read .*BPE dropout"):
        QueritProcessor.from_pretrained(tmp_path)
    processor.tokenizer.backend_tokenizer.model.dropout = None
    assert processor.encode(["who wrote it"], ["a novel"]) == expected
