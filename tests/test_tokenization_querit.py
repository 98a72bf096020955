"""The tokenizer of a saved folder: pairs, the chat template, and what others do with it."""

import copy
import pickle

import pytest
import tiny
from hypothesis import assume, given
from hypothesis import strategies as st
from pair_texts import TEXT, encode, holds_a_token_name
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_querit import QueritProcessor
from modeling_querit.pair_encoding_querit import CLS_TOKEN
from modeling_querit.tokenization_querit import CHAT_TEMPLATE

# The chat template, and the tokenizer that other runtimes load


def messages(query, document, title=None, instruction=None):
    roles = {"system": instruction, "query": query, "title": title, "document": document}
    return [{"role": role, "content": content} for role, content in roles.items() if content is not None]


@pytest.fixture(scope="session")
def portable_folder(any_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    any_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def portable(portable_folder):
    """The tokenizer as it lies in a saved folder, loaded by AutoTokenizer."""
    return AutoTokenizer.from_pretrained(portable_folder)


@given(query=TEXT, document=TEXT, title=st.one_of(st.none(), TEXT), instruction=st.one_of(st.none(), TEXT))
def test_chat_template_gives_the_same_ids(any_processor, portable, query, document, title, instruction):
    assume(not holds_a_token_name(portable, query, document, title or "", instruction or ""))
    rendered = portable.apply_chat_template(messages(query, document, title, instruction), tokenize=False)
    expected = encode(any_processor, query, {"title": title, "text": document}, instruction, max_length=1000)
    assert portable(rendered, add_special_tokens=True)["input_ids"] == expected.input_ids
    chat = portable.apply_chat_template(messages(query, document, title, instruction), tokenize=True, return_dict=True)
    assert chat["input_ids"] == expected.input_ids


def test_order_of_the_messages_does_not_matter(portable):
    one = messages("q", "d", "t", "i")
    assert portable.apply_chat_template(one, tokenize=False) == portable.apply_chat_template(one[::-1], tokenize=False)
    assert portable.apply_chat_template(one, tokenize=False) == "i Query: q; Content: t d[CLS]"


def test_the_saved_tokenizer_adds_nothing_to_a_single_text(any_processor, portable):
    text = "who wrote it; nobody"
    plain = any_processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert portable(text, add_special_tokens=True)["input_ids"] == plain
    assert portable.num_special_tokens_to_add() == 0


def test_the_saved_tokenizer_drops_what_a_post_processor_added(tmp_path):
    tokenizer = tiny.make_tokenizer(bos_token="<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 1
    processor = QueritProcessor(tokenizer)
    assert encode(processor, "q", "d").input_ids[0] != 1
    processor.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a", add_special_tokens=True)["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    # The tokenizer that was passed in is not changed.
    assert tokenizer("a")["input_ids"][0] == 1


def test_the_saved_tokenizer_pads_on_the_left(portable, any_processor):
    assert portable.padding_side == "left"
    assert portable.cls_token == CLS_TOKEN
    assert portable.cls_token_id == any_processor.cls_token_id
    assert portable.chat_template == CHAT_TEMPLATE
    assert portable.model_max_length == any_processor.max_length
    assert portable.pad_token is not None
    batch = portable(["x", "a longer text"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


@given(query=TEXT, document=TEXT)
def test_round_trip(any_processor, round_trip, query, document):
    assert encode(round_trip, query, document) == encode(any_processor, query, document)


@pytest.fixture(scope="session")
def round_trip(portable_folder, tmp_path_factory):
    """The processor after it was saved and loaded twice."""
    folder = tmp_path_factory.mktemp("again")
    QueritProcessor.from_pretrained(portable_folder).save_pretrained(folder)
    return QueritProcessor.from_pretrained(folder)


def test_round_trip_of_the_limit(tokenizer, tmp_path):
    QueritProcessor(tokenizer, max_length=99).save_pretrained(tmp_path)
    assert QueritProcessor.from_pretrained(tmp_path).max_length == 99
    assert QueritProcessor.from_pretrained(tmp_path, max_length=50).max_length == 50


def test_special_tokens_survive_the_round_trip(any_processor, round_trip):
    old, new = any_processor.tokenizer, round_trip.tokenizer
    assert new.get_vocab() == old.get_vocab()
    assert (new.pad_token or new.eos_token, new.eos_token) == (
        old.pad_token or old.eos_token or CLS_TOKEN,
        old.eos_token,
    )
    assert set(new.all_special_tokens) >= set(map(str, old.all_special_tokens))


# Pairs

TRUNCATIONS = [True, "longest_first", "only_second"]


@pytest.mark.slow
@given(query=TEXT, document=TEXT, instruction=st.one_of(st.none(), TEXT), max_length=st.integers(60, 120))
def test_a_pair_has_the_ids_of_the_contract(any_processor, portable, query, document, instruction, max_length):
    whole = encode(any_processor, query, document, instruction, max_length=4096).input_ids
    assert portable(query, document, instruction=instruction)["input_ids"] == whole
    assume(len(portable(instruction or "", "")["input_ids"]) < max_length)
    cut = portable(query, document, instruction=instruction, truncation=True, max_length=max_length)
    assert cut["input_ids"] == encode(any_processor, query, document, instruction, max_length).input_ids


@pytest.fixture(scope="module")
def portable_folder_tiny(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def portable_tiny(portable_folder_tiny):
    return AutoTokenizer.from_pretrained(portable_folder_tiny)


def test_every_way_to_give_pairs(processor, portable_tiny):
    queries, documents = ["who wrote it?", "the judge", "x"], ["nobody", "", {"title": "The book", "text": " a novel "}]
    expected = [pair.input_ids for pair in processor.encode(queries, documents)]
    pairs = list(zip(queries, documents, strict=True))
    for batch in (
        portable_tiny(queries, documents),
        portable_tiny(tuple(queries), tuple(documents)),
        portable_tiny(text=queries, text_pair=documents),
        portable_tiny(pairs),
        portable_tiny([list(pair) for pair in pairs]),
    ):
        assert batch["input_ids"] == expected
        assert batch["attention_mask"] == [[1] * len(ids) for ids in expected]
    for (query, document), ids in zip(pairs, expected, strict=True):
        assert portable_tiny(query, document)["input_ids"] == portable_tiny.encode(query, document) == ids
        assert portable_tiny([(query, document)])["input_ids"] == [ids]
        assert portable_tiny(query, document, return_tensors="pt")["input_ids"].tolist() == [ids]
    assert portable_tiny([], [])["input_ids"] == []


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_cls_survives_truncation(processor, portable_tiny, truncation):
    for query, document in [("who", tiny.LONG_DOCUMENT), ("who " * 100, tiny.LONG_DOCUMENT), ("who " * 100, "x")]:
        ids = portable_tiny(query, document, truncation=truncation, max_length=64)["input_ids"]
        assert ids == encode(processor, query, document, max_length=64).input_ids
        assert (len(ids), ids[-1]) == (64, processor.cls_token_id)
        limited = portable_tiny([query], [document], truncation=truncation)["input_ids"]
        assert limited == [encode(processor, query, document).input_ids]
    assert len(portable_tiny("who", tiny.LONG_DOCUMENT)["input_ids"]) > tiny.MAX_LENGTH


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "padding",
    [{"padding": True}, {"padding": "max_length", "max_length": 99}, {"padding": True, "pad_to_multiple_of": 8}],
)
def test_pairs_are_padded_on_either_side(processor, portable_tiny, side, padding):
    documents = ["a longer document", "x"]
    batch = portable_tiny(["who"] * 2, documents, padding_side=side, return_tensors="pt", **padding)
    expected = [pair.input_ids for pair in processor.encode(["who"] * 2, documents)]
    assert set(batch) == {"input_ids", "attention_mask"}
    for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        assert row[mask.bool()].tolist() == ids
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
        assert len(row) == 99 if "max_length" in padding else len(row) % padding.get("pad_to_multiple_of", 1) == 0


def test_what_else_a_batch_of_pairs_holds(portable_tiny, processor):
    batch = portable_tiny(
        *(["who", "the judge"], ["x", "a novel"]),
        return_token_type_ids=True,
        return_special_tokens_mask=True,
        return_length=True,
        return_attention_mask=False,
    )
    lengths = [len(ids) for ids in batch["input_ids"]]
    assert batch["token_type_ids"] == [[0] * length for length in lengths]
    assert batch["special_tokens_mask"] == [[0] * (length - 1) + [1] for length in lengths]
    assert batch["length"] == lengths
    assert "attention_mask" not in batch
    without = portable_tiny("who", "x", add_special_tokens=False)["input_ids"]
    assert [*without, processor.cls_token_id] == portable_tiny("who", "x")["input_ids"]
    assert portable_tiny.tokenize("who", "x") == portable_tiny.convert_ids_to_tokens(without)
    assert portable_tiny.num_special_tokens_to_add(pair=True) == len(portable_tiny("", "")["input_ids"])


def test_tokens_that_are_added_count_in_pairs(portable_folder_tiny):
    tokenizer = AutoTokenizer.from_pretrained(portable_folder_tiny)
    before = tokenizer("who", "quokka")["input_ids"]
    tokenizer.add_tokens(["quokka"])
    after = tokenizer("who", "quokka")["input_ids"]
    assert len(after) < len(before)
    assert tokenizer.convert_tokens_to_ids("quokka") in after
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied("who", "quokka")["input_ids"] == after


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda encode: encode("q", "d", truncation="only_first", max_length=60), "truncation=True"),
        (lambda encode: encode("q", "d", return_offsets_mapping=True), "return_offsets_mapping"),
        (lambda encode: encode("q", "d", return_overflowing_tokens=True), "return_overflowing_tokens"),
        (lambda encode: encode("q", instruction="Find it."), "query and a document"),
        (lambda encode: encode(["q", "q"], ["d"]), "2 queries and 1 documents"),
        (lambda encode: encode("q", ["d"]), "a list of each"),
        (lambda encode: encode(["q"], "d"), "a list of each"),
        (lambda encode: encode("q", 3), "A document is a string"),
        (lambda encode: encode([("q", "d"), "q"]), "Only some of the texts are"),
        (lambda encode: encode([("q", "d"), ("q", "d", "d")]), "Only some of the texts are"),
    ],
)
def test_what_pairs_cannot_do_is_said(portable_tiny, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(portable_tiny)


def test_two_words_are_no_pair(portable_tiny):
    words = [["who", "wrote"], ["the", "judge"]]
    rows = portable_tiny(words, is_split_into_words=True)["input_ids"]
    assert rows == [portable_tiny(row, is_split_into_words=True)["input_ids"] for row in words]


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_cls_survives_the_truncation_of_a_rendered_text(processor, portable_tiny, tensors):
    long, short = (
        portable_tiny.apply_chat_template(messages("who", document), tokenize=False)
        for document in (tiny.LONG_DOCUMENT, "x")
    )
    options = {"truncation": True, "max_length": 64, "padding": True, "return_tensors": tensors}
    batch = portable_tiny([long, short, "no pair"], **options)
    rows = [
        [id_ for id_, is_token in zip(*row, strict=True) if is_token]
        for row in zip(*(map(list, batch[name]) for name in ("input_ids", "attention_mask")), strict=True)
    ]
    assert rows[0] == encode(processor, "who", tiny.LONG_DOCUMENT, max_length=64).input_ids
    assert rows[1] == encode(processor, "who", "x").input_ids
    assert rows[2] == portable_tiny("no pair")["input_ids"]
    whole = portable_tiny(long, truncation=True, max_length=64)["input_ids"]
    assert whole == rows[0]


def test_a_tokenizer_of_another_class_gives_pairs_that_no_model_takes(portable_folder_tiny, models):
    generic = PreTrainedTokenizerFast.from_pretrained(portable_folder_tiny)
    batch = generic("who", "x", return_tensors="pt")
    assert batch["input_ids"].max() > 2**30
    with pytest.raises(ValueError, match=r"not in \[CLS\].*trust_remote_code=True"):
        models("qwen3")(**batch)
