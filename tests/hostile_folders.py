"""Mutations of a folder's config, index, headers and tokenizer, as hypothesis draws them."""

import copy
import json
import struct

from hypothesis import strategies as st

INDEX_FILE = "model.safetensors.index.json"
MUTATED_FILES = ["config.json", INDEX_FILE, "header", "tokenizer.json", "tokenizer_config.json"]
# JSON that is not what a key expects.
VALUES = st.sampled_from(
    [
        *(None, True, False, "", "x", "../outside.safetensors", [], {}, [None], {"a": 1}, [[]]),
        *(0, 1, -1, 3, 7, 10**6, 10**9, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf")),
        *("bfloat16", "int8", "float8_e4m3fn", "qwen3", "gpt2", "silu", "relu", "full_attention", "sliding_attention"),
        *(
            {"quant_method": "bitsandbytes"},
            {"quant_method": "x"},
            {"rope_type": "linear", "factor": 2},
            "a/b",
            "\ud800",
        ),
    ]
)
# Keys that a config may have, and whose values change what is built.
KEYS = st.sampled_from(
    [
        *(
            "quantization_config",
            "attn_implementation",
            "experts_implementation",
            "layer_types",
            "architectures",
            "dtype",
        ),
        *(
            "rope_scaling",
            "rope_parameters",
            "text_config",
            "model_type",
            "auto_map",
            "transformers_weights",
            "kernels",
        ),
        *("sliding_window", "attention_dropout", "num_experts_per_tok", "topk_group", "n_group", "q_lora_rank"),
        *("hidden_act", "vocab_size", "pad_token_id", "num_labels", "id2label", "is_decoder", "pruned_heads"),
    ]
)


def places(value, path=()):
    """Paths to all values of a JSON document, lists no further than their first three items."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else list(enumerate(value))[:3]
        for key, inner in list(items)[:40]:
            yield from places(inner, (*path, key))


@st.composite
def mutated_json(draw, document):
    """The text of a JSON document with one to three values replaced, removed or added; or no JSON at all."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(list(places(document))[1:] or [()]))
        if not path or draw(st.integers(0, 20)) == 20:
            return json.dumps(draw(VALUES))
        *above, key = path
        parent = document
        for part in above:
            parent = parent[part]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(VALUES))
        elif kind == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(KEYS)] = copy.deepcopy(draw(VALUES))
    text = json.dumps(document)
    broken = draw(st.sampled_from([None] * 12 + ["cut", "deep", "bytes", "empty"]))
    if broken == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    return {"deep": "[" * 50_000, "bytes": "\udcff\udcfe" + text, "empty": ""}.get(broken, text)


@st.composite
def mutations(draw, folder):
    """A file of a folder and its mutated content, in bytes."""
    name = draw(st.sampled_from(MUTATED_FILES))
    if name == "header":
        path = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        text = draw(mutated_json(json.loads(content[8 : 8 + length]))).encode("utf-8", "surrogateescape")
        stated = draw(st.sampled_from([len(text)] * 9 + [0, len(text) + 1, 2**62]))
        return path.name, struct.pack("<Q", stated) + text + content[8 + length :]
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    return name, draw(mutated_json(document)).encode("utf-8", "surrogateescape")
