"""Batches, and the tokenizer within the reach of users."""

import copy
import pickle
import threading

import pytest
import tiny
from pair_texts import encode, plain_ids
from tokenizers.processors import TemplateProcessing

from modeling_querit import QueritProcessor
from modeling_querit.tokenization_querit import CHAT_TEMPLATE

# Batches


def test_padding_is_on_the_left(processor):
    batch = processor(["q", "q"], ["d", "a longer document"])
    short, long = (encode(processor, "q", document).input_ids for document in ["d", "a longer document"])
    gap = len(long) - len(short)
    assert batch["input_ids"].tolist() == [[0] * gap + short, long]
    assert batch["attention_mask"].tolist() == [[0] * gap + [1] * len(short), [1] * len(long)]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_batch_as_lists(processor):
    assert processor(["q"], ["d"], return_tensors=None)["input_ids"] == [encode(processor, "q", "d").input_ids]


# The tokenizer within the users' reach


def test_what_others_do_to_the_tokenizer_changes_no_ids(any_processor):
    expected = encode(any_processor, "who wrote it", "the judge wrote a book")
    tokenizer = any_processor.tokenizer
    tokenizer(["the judge wrote a book"] * 2, truncation=True, max_length=3, padding="max_length")
    tokenizer.padding_side = "right"
    try:
        assert encode(any_processor, "who wrote it", "the judge wrote a book") == expected
    finally:
        tokenizer.padding_side = "left"


def test_threads_that_truncate_and_pad_change_no_ids(processor):
    documents = [f"the judge wrote {count} books" for count in range(200)]
    expected = processor.encode(["q"] * 200, documents)
    done = threading.Event()

    def truncate():
        while not done.is_set():
            processor.tokenizer(["the judge wrote a book"], truncation=True, max_length=3, padding="max_length")

    thread = threading.Thread(target=truncate, daemon=True)
    thread.start()
    try:
        for _ in range(30):
            assert processor.encode(["q"] * 200, documents) == expected
    finally:
        done.set()
        thread.join(60)


def test_the_tokenizer_saved_by_others_is_the_one_that_a_folder_needs(any_processor, tmp_path):
    processor = copy.deepcopy(any_processor)
    processor.save_pretrained(tmp_path / "ours")
    processor.tokenizer.save_pretrained(tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == names
    for name in names:
        assert (tmp_path / "theirs" / name).read_text() == (tmp_path / "ours" / name).read_text()


def test_a_template_and_a_bos_of_its_own_stay_out(tmp_path):
    """As decoders have them, whose tokenizer would put a <bos> in front, and render a chat."""
    tokenizer = tiny.make_tokenizer(bos_token="<|im_end|>", chat_template="{{ messages }}", padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", 1)]
    )
    processor = QueritProcessor(tokenizer)
    assert processor.tokenizer.chat_template == CHAT_TEMPLATE
    assert processor.tokenizer("the book")["input_ids"] == plain_ids(processor, "the book")
    assert tokenizer.chat_template == "{{ messages }}"


def test_tokens_added_to_it_are_named():
    processor = QueritProcessor(tiny.make_tokenizer())
    processor.tokenizer.add_tokens(["faust"])
    with pytest.raises(ValueError, match=r"model\.processor = QueritProcessor"):
        encode(processor, "q", "faust")
    changed = QueritProcessor(processor.tokenizer)
    assert len(encode(changed, "q", "faust").input_ids) < len(encode(changed, "q", "fausu").input_ids)


def test_copies_of_a_processor_encode_alike(any_processor):
    expected = encode(any_processor, "who wrote it", "the judge wrote a book")
    for copied in (copy.deepcopy(any_processor), pickle.loads(pickle.dumps(any_processor))):
        assert encode(copied, "who wrote it", "the judge wrote a book") == expected
        assert copied.tokenizer is not any_processor.tokenizer
        assert copied.max_length == any_processor.max_length
