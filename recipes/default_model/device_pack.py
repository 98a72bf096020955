"""Pack all that training on an offline GPU machine needs: `python -m recipes.default_model.device_pack`.

EmbeddingGemma in 8 bits, its vocabulary reduced to the 65,536 most frequent tokens ("words", with which the others are
spelled), texts as word ids, queries with BM25's candidates, and `device_train.py`, which needs only torch and numpy.
The output is split into parts of at most 56 MB, `part0`, `part1`, ..., to send one per call; the last call trains.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from . import sources
from .cross_encoder import untrained
from .embed import read_written
from .fast_gemma import PARTS
from .human_rows import ranked_by_bm25, relevant_of
from .package import BM25, DEFAULT_INSTRUCTION

WORDS = 65_536
PART_BYTES = 56_000_000
# Limits: tokens per document, BM25 candidates per query, queries per source.
DOCUMENT_TOKENS, CANDIDATES, QUERIES = 300, 20, 2500


class Packer:
    """Arrays in compressed files, spread over parts.

    Args:
        out: Folder of the parts.
    """

    def __init__(self, out: Path):
        self._out, self._part, self._bytes, self.index = out, 0, 0, {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Write an array."""
        packed = zlib.compress(np.ascontiguousarray(array).tobytes(), 9)
        if self._bytes + len(packed) > PART_BYTES:
            self._part, self._bytes = self._part + 1, 0
        self._bytes += len(packed)
        folder = self._out / f"part{self._part}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.z").write_bytes(packed)
        self.index[name] = [str(array.dtype), list(array.shape)]

    def finish(self, about: dict) -> None:
        """Write the index and the training script into the last part."""
        folder = self._out / f"part{self._part}"
        (folder / "index.json").write_text(json.dumps({"arrays": self.index, **about}), encoding="utf-8")
        shutil.copy(Path(__file__).with_name("device_train.py"), folder)


def in_8_bits(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows symmetrically: int8 values, (rows, columns), and float32 scales, (rows,)."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return (weight / scale).round().to(torch.int8).numpy(), scale[:, 0].numpy().astype(np.float32)


class Words:
    """A vocabulary of 65,536 words, reduced from that of a tokenizer; the other tokens are spelled in words.

    Args:
        tokenizer: Tokenizer with the full vocabulary.
        counts: Frequencies of its token ids in the texts.
        always: Token ids to keep whatever their frequency.
    """

    def __init__(self, tokenizer, counts: Counter, always: Sequence[int]):
        vocab = tokenizer.get_vocab()
        self._names = {number: name for name, number in vocab.items()}
        characters = [number for name, number in vocab.items() if name.startswith("<0x") or (len(name) == 1)]
        # All byte tokens, and the single characters that occur in the texts.
        character_counts = Counter()
        for number, count in counts.items():
            for character in self._names[number]:
                character_counts[character] += count
        characters = [
            number
            for number in characters
            if self._names[number].startswith("<0x") or self._names[number] in character_counts
        ]
        kept = list(dict.fromkeys([*always, *characters, *(number for number, _ in counts.most_common())]))[:WORDS]
        self.kept = kept
        self._word_ids = {number: word for word, number in enumerate(kept)}
        self._by_name = {self._names[number]: word for word, number in enumerate(kept)}
        self._spellings: dict[int, list[int]] = {}

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """Token ids -> word ids."""
        words: list[int] = []
        for number in ids:
            word = self._word_ids.get(number)
            words.extend([word] if word is not None else self._spelled(number))
        return words

    def _spelled(self, number: int) -> list[int]:
        if number not in self._spellings:
            name, words, start = self._names[number], [], 0
            while start < len(name):
                for end in range(len(name), start, -1):
                    if name[start:end] in self._by_name:
                        words.append(self._by_name[name[start:end]])
                        start = end
                        break
                else:
                    words += [self._by_name[f"<0x{byte:02X}>"] for byte in name[start].encode()]
                    start += 1
            self._spellings[number] = words
        return self._spellings[number]


def main() -> None:
    """Pack everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--queries", type=Path, default=Path("runs/default_model/queries"))
    parser.add_argument("--teachers", type=Path, default=Path("runs/default_model/teachers.json"))
    parser.add_argument("--validation", type=Path, default=Path("runs/default_model/validation.jsonl"))
    parser.add_argument("--weights", type=Path, default=Path("runs/weights/embeddinggemma-300m/model_download"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/device"))
    parser.add_argument("--cap", type=int, default=1200, help="documents per source without relevance judgements")
    parser.add_argument("--only", nargs="*", help="sources to pack, for a trial")
    parser.add_argument("--layers", type=int, help="layers of the backbone to pack, for a trial")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(settings.out, ignore_errors=True)
    reranker = untrained(settings.weights)
    tokenizer = reranker.processor.tokenizer

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        # As pairs are: the name of a special token in a text is text.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tokenizer(list(texts), **options)["input_ids"] if texts else []

    lists = [json.loads(line) for line in settings.validation.read_text(encoding="utf-8").splitlines()]
    documents: list[list[int]] = []
    titles: list[int] = []
    document_sources: list[int] = []
    pages: list[str] = []
    queries: list[dict] = []
    judged: list[dict] = []
    names: list[str] = []
    for kind in ("general", "corpora"):
        for name in sources.names(settings.data, kind):
            if settings.only and name not in settings.only:
                continue
            source = sources.load(settings.data, kind, name)
            number, first = len(names), len(documents)
            names.append(name)
            ids = list(source.documents)
            if kind == "corpora":
                ids = sorted(ids, key=lambda document: sources.fraction("device", document))[: settings.cap]
            source_lists = [row for row in lists if row["source"] == name]
            if name in sources.HELD_OUT:
                # Only the documents of the validation lists: such a source is never trained on.
                ids = list(dict.fromkeys(document for row in source_lists for document in row["documents"]))
            indices = {document: first + offset for offset, document in enumerate(ids)}
            texts = [source.documents[document] for document in ids]
            heads = tokens([f" {text['title']}" if text["title"] else "" for text in texts])
            bodies = tokens([f" {text['text'][:1500]}" for text in texts])
            titles += [len(head) for head in heads]
            documents += [[*head, *body][:DOCUMENT_TOKENS] for head, body in zip(heads, bodies, strict=True)]
            document_sources += [number] * len(ids)
            pages += [sources.page_of(name, document) for document in ids]
            for row in source_lists:
                judged.append(
                    {
                        "source": number,
                        "query": tokens([f" {row['query']}"])[0],
                        "documents": [indices[document] for document in row["documents"]],
                        "grades": row["grades"],
                    }
                )
            if name in sources.HELD_OUT:
                continue
            index = BM25({document: source.documents[document] for document in ids})
            usable = _queries(source, read_written(settings.queries, name), indices)
            chosen = sorted(usable, key=lambda query: sources.fraction("device", query["name"]))[:QUERIES]
            ids_of = tokens([f" {query['text']}" for query in chosen])
            for query, query_ids in zip(chosen, ids_of, strict=True):
                queries.append(_packed(query, query_ids, number, source, index, indices))
            print(f"{name}: {len(ids)} documents, {len(chosen)} queries", flush=True)
    order = list(range(len(queries)))
    random.Random(0).shuffle(order)
    queries = [queries[number] for number in order]
    prompts = {
        "before": tokens([f"{DEFAULT_INSTRUCTION} Query:"])[0],
        "between": tokens(["; Content:"])[0],
        "encoder_query": tokens(["task: search result | query:"])[0],
        "encoder_document": tokens(["title: none | text:"])[0],
    }
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    counts: Counter[int] = Counter()
    for token_lists in (documents, [query["ids"] for query in queries], [query["query"] for query in judged]):
        for token_ids in token_lists:
            counts.update(token_ids)
    always = [0, bos, eos, reranker.processor.cls_token_id, *(token for ids in prompts.values() for token in ids)]
    words = Words(tokenizer, counts, always)
    packer = Packer(settings.out)
    backbone = reranker.model
    count = settings.layers or len(backbone.layers)
    for number, layer in enumerate(backbone.layers[:count]):
        for part in PARTS:
            values, scales = in_8_bits(layer.get_submodule(part).weight.detach().float())
            packer.add(f"{number}.{part.split('.')[1]}", values)
            packer.add(f"{number}.{part.split('.')[1]}.scale", scales)
        norms = [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ]
        for norm in [*norms, "self_attn.q_norm", "self_attn.k_norm"]:
            packer.add(f"{number}.{norm.split('.')[-1]}", layer.get_submodule(norm).weight.detach().float().numpy())
    packer.add("norm", backbone.norm.weight.detach().float().numpy())
    for name in ("2_Dense", "3_Dense"):
        values, scales = in_8_bits(load_file(settings.weights / name / "model.safetensors")["linear.weight"].float())
        packer.add(name, values)
        packer.add(f"{name}.scale", scales)
    values, scales = in_8_bits(backbone.get_input_embeddings().weight.detach().float()[words.kept])
    packer.add("words", values)
    packer.add("words.scale", scales)

    def add_texts(name: str, texts: Sequence[Sequence[int]]) -> None:
        written = [words(text) for text in texts]
        packer.add(name, np.array([word for text in written for word in text], dtype=np.uint16))
        packer.add(f"{name}.lengths", np.array([len(text) for text in written], dtype=np.uint16))

    add_texts("documents", documents)
    packer.add("titles", np.array(titles, dtype=np.uint16))
    packer.add("document_sources", np.array(document_sources, dtype=np.uint8))
    page_numbers = {page: number for number, page in enumerate(dict.fromkeys(pages))}
    packer.add("pages", np.array([page_numbers[page] for page in pages], dtype=np.int32))
    add_texts("queries", [query["ids"] for query in queries])
    for name, dtype in (("source", np.uint8), ("positive", np.int32), ("kind", np.uint8)):
        packer.add(f"query_{name}", np.array([query[name] for query in queries], dtype=dtype))
    packer.add("query_candidates", np.array([query["candidates"] for query in queries], dtype=np.int32))
    packer.add("query_shares", np.array([query["shares"] for query in queries], dtype=np.uint8))
    packer.add("query_relevant.lengths", np.array([len(query["relevant"]) for query in queries], dtype=np.uint16))
    packer.add(
        "query_relevant", np.array([document for query in queries for document in query["relevant"]], dtype=np.int32)
    )
    add_texts("judged", [row["query"] for row in judged])
    config = backbone.config
    about = {
        "sources": names,
        "styles": STYLES,
        "prompts": {name: words(ids) for name, ids in prompts.items()},
        "bos": words([bos])[0],
        "eos": words([eos])[0],
        "cls": words([reranker.processor.cls_token_id])[0],
        "judged": [{name: row[name] for name in ("source", "documents", "grades")} for row in judged],
        "weights": json.loads(settings.teachers.read_text())["weights"]["embeddinggemma+bm25"],
        "config": {
            "layers": count,
            "hidden": config.hidden_size,
            "head_dim": config.head_dim,
            "window": config.sliding_window,
            "eps": config.rms_norm_eps,
            "scale": config.query_pre_attn_scalar**-0.5,
            "kinds": list(config.layer_types[:count]),
            "theta": {kind: config.rope_parameters[kind]["rope_theta"] for kind in set(config.layer_types)},
        },
    }
    packer.finish(about)
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.iterdir()) for folder in sorted(settings.out.iterdir())
    }
    print(f"{len(documents)} documents, {len(queries)} queries, {len(judged)} lists; bytes: {sizes}", flush=True)


STYLES = ["human", "cross_lingual", "model", "keywords", "short", "asked", "title", "claim", "question"]


def _queries(source: sources.Source, written: list[dict], indices: dict[str, int]) -> list[dict]:
    """Human and written queries for training."""
    queries = []
    for name, text in source.queries.items():
        relevant = relevant_of(source, name)
        if not any(sources.is_held_out(source.name, document) for document in relevant):
            queries.append({"name": name, "text": text, "relevant": relevant, "style": "human", "native": ""})
    for row in written:
        if row["document"] in indices:
            relevant = {row["document"]: 1.0}
            common = {"name": row["_id"], "text": row["text"], "style": row["style"]}
            queries.append({**common, "relevant": relevant, "native": row.get("native", "")})
    return queries


def _packed(
    query: dict, ids: list[int], number: int, source: sources.Source, index: BM25, indices: dict[str, int]
) -> dict:
    """A query with the indices of its documents, and BM25's top candidates with scores scaled to at most 255."""
    relevant = query["relevant"]
    if query["style"] == "human":
        ranked = [
            document for document in ranked_by_bm25(source, index, query["name"], CANDIDATES) if document in indices
        ]
    else:
        ranked = [document for document, _ in index.search([query["native"] or query["text"]], CANDIDATES)[0]]
    positive = max(relevant, key=lambda document: (relevant[document], document))
    ranked = [document for document in ranked if document not in relevant][: CANDIDATES - 1]
    scores = np.array(index.scores(query["text"], [positive, *ranked]))
    shares = (255 * scores / max(scores.max(), 1e-6)).round().astype(int)
    padding = CANDIDATES - 1 - len(ranked)
    return {
        "ids": ids[:64],
        "source": number,
        "kind": STYLES.index(query["style"]),
        "positive": indices[positive],
        "relevant": [indices[document] for document in relevant if document in indices],
        "candidates": [indices[positive], *(indices[document] for document in ranked), *([-1] * padding)],
        "shares": [*shares.tolist(), *([0] * padding)],
    }


if __name__ == "__main__":
    main()
