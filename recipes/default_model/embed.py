"""Embed every document and query once: `python -m recipes.default_model.embed`.

Resumable: what is in the cache is not computed again. Sources take turns, so that many are complete early.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from transformers import AutoModel, AutoTokenizer

from . import sources
from .package import fastest_dtypes

CHUNK = 512


def query_text(text: str, encoder: str) -> str:
    """A query as an encoder wants to read it."""
    return f"task: search result | query: {text}" if encoder == "embeddinggemma" else text


def texts_of(source: sources.Source, encoder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Documents and queries by id, as an encoder wants to read them."""
    plain = encoder != "embeddinggemma"
    documents = {
        name: f"{each['title']} {each['text']}".strip()
        if plain
        else f"title: {each['title'] or 'none'} | text: {each['text']}"
        for name, each in source.documents.items()
    }
    return documents, {name: query_text(text, encoder) for name, text in source.queries.items()}


def written_texts(folder: Path, source: str, encoder: str) -> list[str]:
    """The written queries of a source, as an encoder wants to read them."""
    return [query_text(each["text"], encoder) for each in read_written(folder, source)]


def read_written(folder: Path, source: str) -> list[dict]:
    """The written queries of a source: taken from its documents, and by a language model."""
    paths = [folder / f"{source}.jsonl", folder / f"{source}.model.jsonl"]
    return [
        json.loads(line) for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()
    ]


class Cache:
    """Embeddings of texts in the files of a folder, float16, found by the digest of a text."""

    def __init__(self, folder: Path):
        self.folder, self._found = folder, {}
        for path in sorted(folder.glob("*.safetensors")):
            part = load_file(path)
            self._found.update(zip(map(bytes, part["digests"]), part["embeddings"], strict=True))

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The texts that are not in the cache, each once."""
        return [text for text in dict.fromkeys(texts) if _digest(text) not in self._found]

    def add(self, texts: Sequence[str], embeddings: np.ndarray) -> None:
        """Write the embeddings of some texts to a file of their own."""
        digests = [_digest(text) for text in texts]
        name = hashlib.sha256(b"".join(digests)).hexdigest()[:24]
        part = {
            "digests": np.stack([np.frombuffer(each, np.uint8) for each in digests]),
            "embeddings": np.ascontiguousarray(embeddings.astype(np.float16)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(part, self.folder / f"{name}.aside")
        os.replace(self.folder / f"{name}.aside", self.folder / f"{name}.safetensors")
        self._found.update(zip(digests, part["embeddings"], strict=True))

    def get(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, dimensions), float32."""
        return np.stack([self._found[_digest(text)] for text in texts]).astype(np.float32)


class Encoder:
    """A sentence-transformers folder whose modules are a backbone, mean pooling, and dense layers without bias.

    Args:
        folder: The folder.
        max_length: Tokens read of a text.
        batch_tokens: Tokens computed at once, padding included.
    """

    def __init__(self, folder: Path, max_length: int = 160, batch_tokens: int = 2048):
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(
            folder, dtype=fastest_dtypes(torch.device("cpu"), torch.bfloat16).products
        ).eval()
        modules = json.loads((folder / "modules.json").read_text())
        self._dense = [
            load_tensors(folder / each["path"] / "model.safetensors")["linear.weight"].float()
            for each in modules
            if each["type"].endswith("Dense")
        ]
        self._max_length, self._batch_tokens = max_length, batch_tokens

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Embeddings of length 1, (texts, dimensions), and the count of tokens."""
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._max_length)["input_ids"]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        found: list[np.ndarray | None] = [None] * len(ids)
        while order:
            longest = len(ids[order[-1]])
            batch = order[-max(self._batch_tokens // longest, 1) :]
            del order[-len(batch) :]
            padded = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, place in enumerate(batch):
                padded[row, : len(ids[place])] = torch.tensor(ids[place])
                mask[row, : len(ids[place])] = 1
            states = self._model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for weight in self._dense:
                pooled = pooled @ weight.T
            pooled = torch.nn.functional.normalize(pooled, dim=-1).numpy()
            for row, place in enumerate(batch):
                found[place] = pooled[row]
        return np.stack(found), sum(map(len, ids))


def main() -> None:
    """Embed all sources of a kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--queries", type=Path, default=Path("runs/default_model/queries"), help="written queries")
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/embeddings"))
    parser.add_argument("--encoder", default="embeddinggemma", help="name of the cache")
    parser.add_argument("--weights", type=Path, default=Path("runs/weights/embeddinggemma-300m/model_download"))
    parser.add_argument("--kinds", nargs="+", default=["general", "corpora"])
    parser.add_argument("--english-only", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    encode = Encoder(settings.weights)
    done = {}
    for kind in settings.kinds:
        work = []
        for name in sources.names(settings.data, kind):
            source = sources.load(settings.data, kind, name)
            if settings.english_only and source.meta.get("languages") != ["en"]:
                continue
            cache = Cache(settings.out / settings.encoder / name)
            documents, queries = texts_of(source, settings.encoder)
            written = written_texts(settings.queries, name, settings.encoder)
            missing = cache.missing([*documents.values(), *queries.values(), *written])
            if missing:
                work.append([name, cache, missing])
        left = sum(min(len(text), 600) for _, _, missing in work for text in missing)
        print(f"{kind}: {sum(len(each[2]) for each in work)} texts of {len(work)} sources are to do", flush=True)
        began, characters, tokens = time.monotonic(), 0, 0
        while work:
            # Four chunks of a source at a time, and two sources side by side: the small ones are complete early.
            name, cache, missing = work.pop(0)
            for _ in range(4):
                chunk, missing = missing[:CHUNK], missing[CHUNK:]
                if not chunk:
                    break
                embeddings, count = encode(chunk)
                cache.add(chunk, embeddings)
                tokens += count
                characters += sum(min(len(text), 600) for text in chunk)
                seconds = time.monotonic() - began
                hours = seconds * (left / characters - 1) / 3600
                print(
                    f"{time.strftime('%H:%M:%S')} {name}: {len(missing)} left; {tokens / seconds:.0f} tokens/s, "
                    f"{kind} done in {hours:.1f} h",
                    flush=True,
                )
            if missing:
                work.insert(min(2, len(work)), [name, cache, missing])
            else:
                done[name] = time.strftime("%H:%M:%S")
    print("all done", flush=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


if __name__ == "__main__":
    main()
