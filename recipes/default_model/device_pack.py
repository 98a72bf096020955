"""Pack what a GPU machine without a network needs: `python -m recipes.default_model.device_pack`.

EmbeddingGemma in 8 bits, with the 65,536 words that the texts use most (others are written with these), the texts as
word numbers, queries with BM25's candidates, and `device_train.py`, which needs nothing but torch and numpy there.
The folder is cut into parts of 56 MB at most, `part0`, `part1`, ...: one call each, the last of which trains.
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
# Tokens of a document that are packed, candidates of BM25 a query, queries of a source.
DOCUMENT_TOKENS, CANDIDATES, QUERIES = 300, 20, 2500


class Packer:
    """Arrays in compressed files, spread over parts.

    Args:
        out: Where the parts go.
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
        """Write the index, and the script that trains, into the last part."""
        folder = self._out / f"part{self._part}"
        (folder / "index.json").write_text(json.dumps({"arrays": self.index, **about}), encoding="utf-8")
        shutil.copy(Path(__file__).with_name("device_train.py"), folder)


def in_8_bits(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers of a row, and the row's scale."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return (weight / scale).round().to(torch.int8).numpy(), scale[:, 0].numpy().astype(np.float32)


class Words:
    """Word numbers below 65,536, for a tokenizer with more.

    Args:
        tokenizer: The tokenizer.
        counts: How often each of its ids is in the texts.
        always: Ids that are kept in any case.
    """

    def __init__(self, tokenizer, counts: Counter, always: Sequence[int]):
        vocab = tokenizer.get_vocab()
        self._names = {number: name for name, number in vocab.items()}
        pieces = [number for name, number in vocab.items() if name.startswith("<0x") or (len(name) == 1)]
        # Every byte, and of the single characters those that the texts have.
        spelled = Counter()
        for number, count in counts.items():
            for character in self._names[number]:
                spelled[character] += count
        pieces = [each for each in pieces if self._names[each].startswith("<0x") or self._names[each] in spelled]
        kept = list(dict.fromkeys([*always, *pieces, *(each for each, _ in counts.most_common())]))[:WORDS]
        self.kept = kept
        self._places = {number: place for place, number in enumerate(kept)}
        self._by_name = {self._names[number]: place for place, number in enumerate(kept)}
        self._spellings: dict[int, list[int]] = {}

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """Token ids as word numbers."""
        found: list[int] = []
        for number in ids:
            place = self._places.get(number)
            found.extend([place] if place is not None else self._spelled(number))
        return found

    def _spelled(self, number: int) -> list[int]:
        if number not in self._spellings:
            name, found, start = self._names[number], [], 0
            while start < len(name):
                for end in range(len(name), start, -1):
                    if name[start:end] in self._by_name:
                        found.append(self._by_name[name[start:end]])
                        start = end
                        break
                else:
                    found += [self._by_name[f"<0x{byte:02X}>"] for byte in name[start].encode()]
                    start += 1
            self._spellings[number] = found
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
    parser.add_argument("--cap", type=int, default=1200, help="documents of a source without judgements")
    parser.add_argument("--only", nargs="*", help="sources, for a trial")
    parser.add_argument("--layers", type=int, help="of the backbone, for a trial")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(settings.out, ignore_errors=True)
    whole = untrained(settings.weights)
    tokenizer = whole.processor.tokenizer

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return whole.processor._tokenize(list(texts))["input_ids"] if texts else []

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
                ids = sorted(ids, key=lambda each: sources.fraction("device", each))[: settings.cap]
            mine = [each for each in lists if each["source"] == name]
            if name in sources.HELD_BACK:
                # Only what the validation lists have: nothing of such a source is trained on.
                ids = list(dict.fromkeys(document for each in mine for document in each["documents"]))
            places = {each: first + place for place, each in enumerate(ids)}
            texts = [source.documents[each] for each in ids]
            heads = tokens([f" {each['title']}" if each["title"] else "" for each in texts])
            bodies = tokens([f" {each['text'][:1500]}" for each in texts])
            titles += [len(each) for each in heads]
            documents += [[*head, *body][:DOCUMENT_TOKENS] for head, body in zip(heads, bodies, strict=True)]
            document_sources += [number] * len(ids)
            pages += [sources.page_of(name, each) for each in ids]
            for each in mine:
                judged.append(
                    {
                        "source": number,
                        "query": tokens([f" {each['query']}"])[0],
                        "documents": [places[document] for document in each["documents"]],
                        "grades": each["grades"],
                    }
                )
            if name in sources.HELD_BACK:
                continue
            index = BM25({each: source.documents[each] for each in ids})
            found = _queries(source, read_written(settings.queries, name), places)
            chosen = sorted(found, key=lambda each: sources.fraction("device", each["name"]))[:QUERIES]
            ids_of = tokens([f" {each['text']}" for each in chosen])
            for each, query_ids in zip(chosen, ids_of, strict=True):
                queries.append(_packed(each, query_ids, number, source, index, places))
            print(f"{name}: {len(ids)} documents, {len(chosen)} queries", flush=True)
    order = list(range(len(queries)))
    random.Random(0).shuffle(order)
    queries = [queries[place] for place in order]
    prompts = {
        "before": tokens([f"{DEFAULT_INSTRUCTION} Query:"])[0],
        "between": tokens(["; Content:"])[0],
        "encoder_query": tokens(["task: search result | query:"])[0],
        "encoder_document": tokens(["title: none | text:"])[0],
    }
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    counts: Counter[int] = Counter()
    for part in (documents, [each["ids"] for each in queries], [each["query"] for each in judged]):
        for each in part:
            counts.update(each)
    always = [0, bos, eos, whole.processor.cls_token_id, *(each for ids in prompts.values() for each in ids)]
    words = Words(tokenizer, counts, always)
    packer = Packer(settings.out)
    backbone = whole.model
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
        written = [words(each) for each in texts]
        packer.add(name, np.array([each for one in written for each in one], dtype=np.uint16))
        packer.add(f"{name}.lengths", np.array([len(each) for each in written], dtype=np.uint16))

    add_texts("documents", documents)
    packer.add("titles", np.array(titles, dtype=np.uint16))
    packer.add("document_sources", np.array(document_sources, dtype=np.uint8))
    page_numbers = {page: number for number, page in enumerate(dict.fromkeys(pages))}
    packer.add("pages", np.array([page_numbers[each] for each in pages], dtype=np.int32))
    add_texts("queries", [each["ids"] for each in queries])
    for name, dtype in (("source", np.uint8), ("positive", np.int32), ("kind", np.uint8)):
        packer.add(f"query_{name}", np.array([each[name] for each in queries], dtype=dtype))
    packer.add("query_candidates", np.array([each["candidates"] for each in queries], dtype=np.int32))
    packer.add("query_shares", np.array([each["shares"] for each in queries], dtype=np.uint8))
    packer.add("query_relevant.lengths", np.array([len(each["relevant"]) for each in queries], dtype=np.uint16))
    packer.add("query_relevant", np.array([each for one in queries for each in one["relevant"]], dtype=np.int32))
    add_texts("judged", [each["query"] for each in judged])
    config = backbone.config
    about = {
        "sources": names,
        "styles": STYLES,
        "prompts": {name: words(ids) for name, ids in prompts.items()},
        "bos": words([bos])[0],
        "eos": words([eos])[0],
        "cls": words([whole.processor.cls_token_id])[0],
        "judged": [{name: each[name] for name in ("source", "documents", "grades")} for each in judged],
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
    sizes = {part.name: sum(each.stat().st_size for each in part.iterdir()) for part in sorted(settings.out.iterdir())}
    print(f"{len(documents)} documents, {len(queries)} queries, {len(judged)} lists; bytes: {sizes}", flush=True)


STYLES = ["human", "cross_lingual", "model", "keywords", "short", "asked", "title", "claim", "question"]


def _queries(source: sources.Source, written: list[dict], places: dict[str, int]) -> list[dict]:
    """Human and written queries for training."""
    found = []
    for name, text in source.queries.items():
        relevant = relevant_of(source, name)
        if not any(sources.is_held_back(source.name, each) for each in relevant):
            found.append({"name": name, "text": text, "relevant": relevant, "style": "human", "native": ""})
    for each in written:
        if each["document"] in places:
            relevant = {each["document"]: 1.0}
            common = {"name": each["_id"], "text": each["text"], "style": each["style"]}
            found.append({**common, "relevant": relevant, "native": each.get("native", "")})
    return found


def _packed(
    query: dict, ids: list[int], number: int, source: sources.Source, index: BM25, places: dict[str, int]
) -> dict:
    """A query with the places of its documents, and BM25's best with their shares of the best score, in 255 parts."""
    relevant = query["relevant"]
    if query["style"] == "human":
        ranked = [each for each in ranked_by_bm25(source, index, query["name"], CANDIDATES) if each in places]
    else:
        ranked = [each for each, _ in index.search([query["native"] or query["text"]], CANDIDATES)[0]]
    positive = max(relevant, key=lambda each: (relevant[each], each))
    ranked = [each for each in ranked if each not in relevant][: CANDIDATES - 1]
    scores = np.array(index.scores(query["text"], [positive, *ranked]))
    shares = (255 * scores / max(scores.max(), 1e-6)).round().astype(int)
    empty = CANDIDATES - 1 - len(ranked)
    return {
        "ids": ids[:64],
        "source": number,
        "kind": STYLES.index(query["style"]),
        "positive": places[positive],
        "relevant": [places[each] for each in relevant if each in places],
        "candidates": [places[positive], *(places[each] for each in ranked), *([-1] * empty)],
        "shares": [*shares.tolist(), *([0] * empty)],
    }


if __name__ == "__main__":
    main()
