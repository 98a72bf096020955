"""Tiny models and tokenizers, and reference computations that several test files share."""

import copy
import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

from modeling_querit import QueritConfig, QueritForSequenceRanking

ARCHITECTURES = ["qwen3", "deepseek_v3"]
BACKBONES = {
    "qwen3": Qwen3Model,
    "deepseek_v3": DeepseekV3Model,
    "llama": LlamaModel,
    "gemma3_text": Gemma3TextModel,
}
MAX_LENGTH = 256
EXPERTS = 8

QUERY = "who wrote the book"
DOCUMENTS = [
    "a novel by lee",
    {"title": "The book", "text": "who wrote it is not known; nobody asked."},
    "",
    "x",
    "Der Richter schrieb das Buch im Jahr 1831.",
    "知らない人が書いた本",
]
# The same documents for runtimes that do not know titles.
STRINGS = [
    document if isinstance(document, str) else f"{document['title']} {document['text']}" for document in DOCUMENTS
]
# Enough different documents for several forward passes.
STREAM = [f"{word} {number}" for word in ["book", "novel", "judge", "x"] for number in range(25)]
INSTRUCTION = "Find a novel."
# Layouts of published checkpoints.
LAYOUTS = {
    "as published": {},
    "backbone without prefix": {"prefix": ""},
    "with lm_head": {"lm_head": True},
    "without prefix, with lm_head": {"prefix": "", "lm_head": True},
    "sharded": {"shards": 3},
    "sharded without prefix": {"shards": 3, "prefix": ""},
}
# Longer than 256 tokens, so that it is cut.
LONG_DOCUMENT = "the judge wrote a book about the content of another book, " * 40

_CORPUS = [
    "Judge whether the Content meets the requirements based on the Query. Query: who wrote it?; Content: nobody",
    "who wrote the book about the content? f(x); Content: the judge wrote it, in a novel.; Content: another book",
    "the content meets the requirements; the query asks who wrote the novel.",
]


def make_tokenizer(**kwargs):
    """A byte-level BPE of 512 tokens, trained here; `?;` and `);` are single tokens, as in large vocabularies."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<|im_end|>", "[CLS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    kwargs = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "cls_token": "[CLS]"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **kwargs)


def make_text_config(architecture, **kwargs):
    # Large initial weights, so that every token moves the score by far more than the tolerances.
    common = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if architecture == "deepseek_v3":
        common |= {
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
    else:
        common["head_dim"] = 16
    configs = {
        "qwen3": Qwen3Config,
        "deepseek_v3": DeepseekV3Config,
        "llama": LlamaConfig,
        "gemma3_text": Gemma3TextConfig,
    }
    return configs[architecture](**common | kwargs)


def make_model(architecture, processor=None, **kwargs):
    """A model in which every tensor matters: norms, routing biases and head are random too."""
    torch.manual_seed(0)
    model = QueritForSequenceRanking(QueritConfig(text_config=make_text_config(architecture, **kwargs))).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith("e_score_correction_bias"):
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
        model.score.weight.normal_(std=0.1)
        model.score.bias.normal_(std=0.1)
    if processor is not None:
        model.processor = processor
    return model


def pairs(documents=DOCUMENTS, query=QUERY):
    return [(query, document) for document in documents]


def softmax_difference(logits):
    """p1 - p0 in float64 numpy."""
    logits = np.asarray(logits, dtype=np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    return probabilities[..., 1] - probabilities[..., 0]


def reference_score(model, ids, position_ids=None):
    """The score of one unpadded sequence, by transformers' own backbone and numpy in float64."""
    config = copy.deepcopy(model.config.text_config)
    # None of our own code.
    config._experts_implementation = "eager"
    backbone = BACKBONES[config.model_type](config).eval()
    backbone.load_state_dict(model.model.state_dict())
    with torch.inference_mode():
        states = backbone(input_ids=torch.tensor([ids])).last_hidden_state
    last = states[0, -1].double().numpy()
    weight, bias = (tensor.detach().double().numpy() for tensor in (model.score.weight, model.score.bias))
    return float(softmax_difference(weight @ last + bias))


def published_tensors(model, prefix="model."):
    """The weights as published: `head.*`, and one key for every expert; the split is written out here by hand."""
    tensors = {}
    for key, tensor in model.model.state_dict().items():
        if key.endswith("mlp.experts.gate_up_proj"):
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                start = key.removesuffix("gate_up_proj")
                tensors[f"{prefix}{start}{index}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}{start}{index}.up_proj.weight"] = up.contiguous()
        elif key.endswith("mlp.experts.down_proj"):
            for index, down in enumerate(tensor):
                tensors[f"{prefix}{key.removesuffix('down_proj')}{index}.down_proj.weight"] = down.contiguous()
        else:
            tensors[prefix + key] = tensor
    tensors["head.weight"], tensors["head.bias"] = model.score.weight.detach(), model.score.bias.detach()
    return {key: tensor.clone() for key, tensor in tensors.items()}


def write_published(folder, model, tensors, shards=1):
    """A folder as published: the backbone's flat config with a class that does not exist and no auto_map."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.text_config.to_dict()
    config |= {"architectures": ["MLQwen3Model"], "dtype": str(next(iter(tensors.values())).dtype).split(".")[1]}
    (folder / "config.json").write_text(json.dumps(config))
    model.processor.tokenizer.save_pretrained(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": {}}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_tensors(folder):
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def bytes_of(tokenizer, ids):
    """The UTF-8 bytes that ids of a byte-level tokenizer stand for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    return b"".join(
        bytes(byte_of[character] for character in token) for token in tokenizer.convert_ids_to_tokens(list(ids))
    )
