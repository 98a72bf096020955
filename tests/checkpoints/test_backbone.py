"""New rerankers from plain decoders."""

import json

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, PreTrainedTokenizerFast

from modeling_querit import QueritForSequenceRanking, from_backbone
from modeling_querit.pair_encoding_querit import DEFAULT_INSTRUCTION


def tokenizer_without_cls(third_token):
    """The tiny tokenizer with another token instead of `[CLS]`."""
    spec = json.loads(tiny.make_tokenizer().backend_tokenizer.to_str())
    for token in spec["added_tokens"]:
        if token["content"] == "[CLS]":
            token["content"] = third_token
    spec["model"]["vocab"][third_token] = spec["model"]["vocab"].pop("[CLS]")
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")


def save_decoder(folder, tokenizer, architecture="qwen3", **kwargs):
    torch.manual_seed(0)
    AutoModel.from_config(tiny.make_text_config(architecture, **kwargs)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_untrained_reranker_keeps_the_decoder_and_scores_zero(tmp_path, architecture):
    folder = save_decoder(tmp_path / "decoder", tiny.make_tokenizer(), architecture)
    model = from_backbone(folder)
    assert [ranked.score for ranked in model.rank(tiny.QUERY, tiny.DOCUMENTS)] == [0.0] * len(tiny.DOCUMENTS)
    for name, tensor in AutoModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "saved")
    again = QueritForSequenceRanking.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.score.weight, torch.zeros(2, 32))


def test_the_data_type_is_that_of_the_call(tmp_path):
    folder = save_decoder(tmp_path / "decoder", tiny.make_tokenizer())
    assert {parameter.dtype for parameter in from_backbone(folder, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_cls_replaces_an_unused_token(tmp_path):
    tokenizer = tokenizer_without_cls("<unused0>")
    folder = save_decoder(tmp_path / "decoder", tokenizer)
    processor = from_backbone(folder).processor
    assert processor.cls_token_id == tokenizer.convert_tokens_to_ids("<unused0>")
    assert len(processor.tokenizer) == len(tokenizer)
    assert "<unused0>" not in processor.tokenizer.get_vocab()
    assert processor.encode(["a"], ["b"])[0].input_ids[-1] == processor.cls_token_id


def test_without_an_unused_token_the_vocabulary_grows(tmp_path):
    tokenizer = tokenizer_without_cls("<other>")
    size = len(tokenizer)
    model = from_backbone(save_decoder(tmp_path / "decoder", tokenizer, vocab_size=size))
    assert model.processor.cls_token_id == size
    assert model.model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == size + 1
    assert model.rank("a", ["b"])[0].score == 0


def test_the_first_token_gets_the_embedding_of_bos(tmp_path):
    tokenizer = tiny.make_tokenizer(bos_token="<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", tokenizer.bos_token_id)]
    )
    folder = save_decoder(tmp_path / "decoder", tokenizer)
    embeddings = from_backbone(folder).model.get_input_embeddings().weight
    first = tokenizer(DEFAULT_INSTRUCTION, add_special_tokens=False).input_ids[0]
    assert torch.equal(embeddings[first], embeddings[tokenizer.bos_token_id])


def test_a_decoder_without_bos_keeps_its_embeddings(tmp_path):
    tokenizer = tiny.make_tokenizer()
    folder = save_decoder(tmp_path / "decoder", tokenizer)
    expected = AutoModel.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(from_backbone(folder).model.get_input_embeddings().weight, expected)
