"""Train the strong cross-encoder on a GPU machine, from the parts that `device_pack` made.

    python3 device_train.py --parts PART0 PART1 ... --out FOLDER --seconds 400

Self-contained: needs only torch and numpy, and is packed with its data. It embeds all texts with EmbeddingGemma, draws
rows as `rows.py` does (hard negatives from BM25 and the encoder, soft labels from the ensemble), trains adapters and
head for `--seconds` with a learning rate that decays to zero, and writes what `device_import` reads: adapters in
bfloat16, the training curve, and the rows it drew, with the encoder's cosines.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384)
HUMAN, ORIGIN, SPAN = 2.0, 1.5, 10.0
FILE_BYTES = 15_000_000


class Packed:
    """The arrays of all parts.

    Args:
        parts: Folders written by `device_pack`.
    """

    def __init__(self, parts: Sequence[Path]):
        self._files = {path.name.removesuffix(".z"): path for part in parts for path in part.glob("*.z")}
        (index,) = [part / "index.json" for part in parts if (part / "index.json").exists()]
        self.about = json.loads(index.read_text(encoding="utf-8"))
        missing = sorted(self.about["arrays"].keys() - self._files.keys())
        if missing:
            raise FileNotFoundError(f"{len(missing)} arrays are missing, {missing[0]} first: pass all parts.")

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape = self.about["arrays"][name]
        return np.frombuffer(zlib.decompress(self._files[name].read_bytes()), dtype).reshape(shape)

    def weight(self, name: str) -> Tensor:
        """A weight packed in 8 bits, dequantized to float32."""
        return torch.from_numpy(self[name].astype(np.float32) * self[f"{name}.scale"][:, None])

    def texts(self, name: str) -> list[np.ndarray]:
        """Word ids by text."""
        lengths = self[f"{name}.lengths"].astype(np.int64)
        return np.split(self[name].astype(np.int64), np.cumsum(lengths)[:-1])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's RMSNorm."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)).to(x.dtype)


class Linear(nn.Module):
    """A frozen linear layer with an adapter.

    Args:
        weight: Weight of the linear layer, (out, in).
        rank: Rank of the adapter.
        scale: Factor of the adapter, `alpha / rank`.
        dtype: Dtype of the matrix products.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight.to(dtype))
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        """(..., in) -> (..., out)"""
        y = functional.linear(x, self.weight)
        if adapted:
            y = y + functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype) * self.scale)
        return y


class Layer(nn.Module):
    """A layer of Gemma 3 with bidirectional attention."""

    def __init__(self, packed: Packed, number: int, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        config = packed.about["config"]
        for part in PARTS:
            setattr(self, part, Linear(packed.weight(f"{number}.{part}"), rank, scale, dtype))
        for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"):
            self.register_buffer(name, torch.from_numpy(packed[f"{number}.{name}"].copy()))
        for name in ("post_feedforward_layernorm", "q_norm", "k_norm"):
            self.register_buffer(name, torch.from_numpy(packed[f"{number}.{name}"].copy()))
        self.eps, self.dim, self.scaling = config["eps"], config["head_dim"], config["scale"]

    def forward(self, h: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, adapted: bool) -> Tensor:
        """(batch, width, hidden), with a mask of (batch, 1, 1 or width, width) -> (batch, width, hidden)."""
        batch, width, _ = h.shape
        x = norm(h, self.input_layernorm, self.eps)

        def heads(part: Linear) -> Tensor:
            return part(x, adapted).view(batch, width, -1, self.dim).transpose(1, 2)

        q = turn(norm(heads(self.q_proj), self.q_norm, self.eps), cos, sin)
        k = turn(norm(heads(self.k_proj), self.k_norm, self.eps), cos, sin)
        v = heads(self.v_proj)
        k, v = (tensor.expand(batch, q.shape[1], width, self.dim) for tensor in (k, v))
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        x = self.o_proj(x.transpose(1, 2).reshape(batch, width, -1), adapted)
        h = h + norm(x, self.post_attention_layernorm, self.eps)
        x = norm(h, self.pre_feedforward_layernorm, self.eps)
        x = functional.gelu(self.gate_proj(x, adapted), approximate="tanh") * self.up_proj(x, adapted)
        return h + norm(self.down_proj(x, adapted), self.post_feedforward_layernorm, self.eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (batch, heads, width, dim)."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Model(nn.Module):
    """The encoder, which adapters and head make a cross-encoder.

    Args:
        packed: Packed weights.
        rank: Rank of the adapters.
        alpha: Numerator of the adapters' scale, `alpha / rank`.
        device: Device to compute on.
        dtype: Dtype of the matrix products.
    """

    def __init__(self, packed: Packed, rank: int, alpha: float, device: str, dtype: torch.dtype):
        super().__init__()
        config = packed.about["config"]
        self.config, self.about, self.device, self.dtype = config, packed.about, device, dtype
        self.layers = nn.ModuleList(
            Layer(packed, number, rank, alpha / rank, dtype) for number in range(config["layers"])
        )
        self.register_buffer("words", packed.weight("words").to(dtype))
        self.register_buffer("last_norm", torch.from_numpy(packed["norm"].copy()))
        self.register_buffer("dense1", packed.weight("2_Dense"))
        self.register_buffer("dense2", packed.weight("3_Dense"))
        self.head = nn.Linear(config["hidden"], 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for kind, theta in config["theta"].items():
            half = torch.arange(0, config["head_dim"], 2).float() / config["head_dim"]
            angles = torch.arange(WIDTHS[-1]).float()[:, None] / theta**half
            self.register_buffer(f"{kind}_cos", angles.cos())
            self.register_buffer(f"{kind}_sin", angles.sin())
        self.to(device)
        self._run = Layer.forward

    def compile(self) -> None:
        """Compile the forward pass that all layers share."""
        self._run = torch.compile(Layer.forward, dynamic=True)

    def states(self, texts: Sequence[Sequence[int]], adapted: bool) -> tuple[Tensor, Tensor]:
        """Final hidden states, (texts, width, hidden), and lengths, (texts,); texts are padded on the right."""
        lengths = torch.tensor([len(text) for text in texts])
        width = next(width for width in WIDTHS if width >= int(lengths.max()))
        padded = np.zeros((len(texts), width), dtype=np.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        ids, lengths = torch.from_numpy(padded).to(self.device), lengths.to(self.device)
        positions = torch.arange(width, device=self.device)
        mask = (positions[None] < lengths[:, None])[:, None, None, :].expand(-1, 1, width, -1)
        near = mask
        if width > self.config["window"]:
            near = mask & ((positions[:, None] - positions[None]).abs() < self.config["window"])
        h = functional.embedding(ids, self.words) * torch.tensor(self.config["hidden"] ** 0.5).to(self.dtype)
        for layer, kind in zip(self.layers, self.config["kinds"], strict=True):
            cos, sin = (getattr(self, f"{kind}_{name}")[:width] for name in ("cos", "sin"))
            h = self._run(layer, h, near if kind == "sliding_attention" else mask, cos, sin, adapted)
        return norm(h, self.last_norm, self.config["eps"]), lengths

    @torch.no_grad()
    def embed(self, texts: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """Embeddings of unit length, (texts, dimensions), float16, in batches of about `tokens` tokens."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeddings = torch.empty(len(texts), self.dense2.shape[0], dtype=torch.float16, device=self.device)
        while order:
            batch = order[-max(1, tokens // max(64, len(texts[order[-1]]))) :]
            del order[-len(batch) :]
            states, lengths = self.states([texts[index] for index in batch], adapted=False)
            within = torch.arange(states.shape[1], device=self.device)[None] < lengths[:, None]
            pooled = (states.float() * within[..., None]).sum(1) / lengths[:, None]
            pooled = functional.normalize(pooled @ self.dense1.T @ self.dense2.T, dim=-1)
            embeddings[torch.tensor(batch, device=self.device)] = pooled.half()
        return embeddings

    def scores(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logit differences z1 - z0, (texts,), float32."""
        states, lengths = self.states(texts, adapted=True)
        last = states[torch.arange(len(texts), device=self.device), lengths - 1].float()
        logits = functional.linear(last, self.head.weight, self.head.bias)
        return logits[:, 1] - logits[:, 0]


class Rows:
    """Queries and documents with the encoder's cosines, from which training rows are drawn.

    Args:
        packed: Packed data.
        model: Encoder.
        tokens: Tokens of a batch.
    """

    def __init__(self, packed: Packed, model: Model, tokens: int):
        self.about, prompts = packed.about, packed.about["prompts"]
        self.documents, self.queries = packed.texts("documents"), packed.texts("queries")
        self.titles, self.sources = packed["titles"].astype(int), packed["document_sources"].astype(int)
        self.pages = packed["pages"]
        self.source, self.positive = packed["query_source"].astype(int), packed["query_positive"]
        self.kinds = [packed.about["styles"][kind] for kind in packed["query_kind"]]
        self.candidates, self.shares = packed["query_candidates"], packed["query_shares"]
        lengths = packed["query_relevant.lengths"].astype(np.int64)
        self.relevant = np.split(packed["query_relevant"], np.cumsum(lengths)[:-1])
        bos, eos = [self.about["bos"]], [self.about["eos"]]
        began = time.monotonic()
        documents = [[*bos, *prompts["encoder_document"], *text[:150], *eos] for text in self.documents]
        queries = [[*bos, *prompts["encoder_query"], *text, *eos] for text in self.queries]
        # Kept on the device for searches: a few hundred megabytes.
        self.vectors, self.query_vectors = model.embed(documents, tokens), model.embed(queries, tokens)
        print(f"embedded {len(documents) + len(queries)} texts in {time.monotonic() - began:.0f} s", flush=True)
        self.by_source = {source: np.flatnonzero(self.sources == source) for source in set(self.source.tolist())}
        self.near = np.zeros((len(self.queries), 50), dtype=np.int32)
        self.cosines = np.zeros((len(self.queries), 50), dtype=np.float32)
        for source, members in self.by_source.items():
            numbers = np.flatnonzero(self.source == source)
            vectors = self.vectors[torch.from_numpy(members).to(model.device)].float()
            for start in range(0, len(numbers), 1024):
                part = numbers[start : start + 1024]
                cosines = self.query_vectors[torch.from_numpy(part).to(model.device)].float() @ vectors.T
                best, indices = cosines.topk(min(50, len(members)), -1)
                self.near[part] = np.pad(
                    members[indices.cpu().numpy()], ((0, 0), (0, 50 - best.shape[1])), constant_values=-1
                )
                self.cosines[part, : best.shape[1]] = best.cpu().numpy()

    def draw(self, number: int, rng: np.random.Generator, size: int = 10) -> dict | None:
        """A row: documents, their texts, labels and relevance; None if the query fails the round-trip filter."""
        positive, kind = int(self.positive[number]), self.kinds[number]
        near = [document for document in self.near[number].tolist() if document >= 0]
        words = [document for document in self.candidates[number].tolist() if document >= 0]
        is_human = kind in ("human", "cross_lingual")
        if not is_human and positive not in near[:20]:
            return None
        if kind == "model" and next((document for document in near if document in set(words)), None) != positive:
            return None
        relevant = set(self.relevant[number].tolist())
        pages = {self.pages[document] for document in relevant}
        chosen = [positive]

        def add(ranking: Sequence[int], count: int) -> None:
            eligible = [
                document for document in ranking if document not in chosen and self.pages[document] not in pages
            ]
            count = min(count, len(eligible), size - len(chosen))
            if count > 0:
                chosen.extend(int(document) for document in rng.choice(eligible, count, replace=False))

        add(near[:10], 3)
        add(words[:10], 2)
        add(near[10:], 2)
        add(words[10:], 1)
        members = self.by_source[self.source[number]]
        for _ in range(20):
            add([int(rng.choice(members))], 1)
        texts = [self.documents[document] for document in chosen]
        if kind == "title":
            texts = [text[self.titles[document] :] for document, text in zip(chosen, texts, strict=True)]
        elif kind in ("claim", "question", "asked"):
            texts[0] = without(texts[0], self.queries[number])
        cosines = self._cosines(number, chosen)
        shares = dict(zip(self.candidates[number].tolist(), self.shares[number].tolist(), strict=True))
        lowest = min(self.shares[number][: len(words)].tolist(), default=0)
        words_share = np.array([shares.get(document, lowest / 2) for document in chosen]) / 255
        weights = self.about["weights"]
        logits = weights["embeddinggemma"] * cosines + weights["bm25"] * words_share + weights["offset"]
        logits[0] += HUMAN if is_human else ORIGIN
        return {
            "number": number,
            "documents": chosen,
            "texts": texts,
            "cosines": cosines,
            "labels": np.clip(1 + (logits - logits.max()) / SPAN, 0, 1),
            "relevance": 1 / (1 + np.exp(-logits)),
        }

    def _cosines(self, number: int, documents: list[int]) -> np.ndarray:
        cosines = dict(zip(self.near[number].tolist(), self.cosines[number].tolist(), strict=True))
        lowest = float(self.cosines[number].min())
        missing = [document for document in documents if document not in cosines]
        if missing:
            computed = self.vectors[missing].float() @ self.query_vectors[number].float()
            cosines.update(zip(missing, computed.tolist(), strict=True))
        return np.array([cosines.get(document, lowest) for document in documents])


def without(text: np.ndarray, part: np.ndarray) -> np.ndarray:
    """A text without the first occurrence of a part, unless little would be left."""
    text, part = list(text), list(part)
    for start in range(len(text) - len(part) + 1):
        if text[start : start + len(part)] == part and len(text) > len(part) + 5:
            return np.array([*text[:start], *text[start + len(part) :]])
    return np.array(text)


def pair(about: dict, query: Sequence[int], document: Sequence[int], limit: int) -> list[int]:
    """A pair in the published input format, whose document is truncated to `limit` words in all."""
    head = [*about["prompts"]["before"], *query, *about["prompts"]["between"]]
    return [*head, *document[: max(0, limit - 1 - len(head))], about["cls"]]


def losses(scores: Tensor, labels: Tensor, relevance: Tensor, pointwise: float) -> Tensor:
    """Listwise KL divergence from the labels plus weighted cross-entropy with the relevance, (queries,)."""
    target = (SPAN * labels).log_softmax(-1)
    listwise = (target.exp() * (target - scores.log_softmax(-1))).sum(-1)
    point = functional.binary_cross_entropy_with_logits(scores, relevance, reduction="none").mean(-1)
    return listwise + pointwise * point


def ndcg(grades: Sequence[float], scores: Sequence[float]) -> float:
    """nDCG@10 of documents sorted by score."""

    def dcg(ordered: Sequence[float]) -> float:
        return sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(ordered[:10]))

    order = sorted(range(len(grades)), key=lambda index: -scores[index])
    return dcg([grades[index] for index in order]) / dcg(sorted(grades, reverse=True))


@torch.no_grad()
def validate(model: Model, rows: Rows, judged: list[np.ndarray]) -> dict:
    """nDCG@10 x 100 on the validation lists: of the model by source, and macro-averages of the model and of BM25."""
    about, model_ndcg, bm25_ndcg = model.about, {}, {}
    for query, row in zip(judged, about["judged"], strict=True):
        texts = [pair(about, query, rows.documents[document], 256) for document in row["documents"]]
        name = about["sources"][row["source"]]
        model_ndcg.setdefault(name, []).append(ndcg(row["grades"], model.scores(texts).tolist()))
        bm25_ndcg.setdefault(name, []).append(ndcg(row["grades"], [-rank for rank in range(len(texts))]))
    means = {name: round(100 * float(np.mean(values)), 1) for name, values in model_ndcg.items()}
    bm25 = float(np.mean([np.mean(values) for values in bm25_ndcg.values()]))
    return {"model": round(float(np.mean(list(means.values()))), 2), "bm25": round(100 * bm25, 2), "by_source": means}


def main() -> None:
    """Embed all texts, train, and write the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="from the start of the program to its last step")
    parser.add_argument("--queries", type=int, default=32, help="queries per step")
    parser.add_argument("--micro", type=int, default=16, help="queries per micro-batch")
    parser.add_argument("--size", type=int, default=10, help="documents per query")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--head-rate", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--steady", type=float, default=0.6, help="fraction of the time at a constant learning rate")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--pointwise", type=float, default=0.2)
    parser.add_argument("--validate-every", type=float, default=90, help="seconds")
    parser.add_argument("--embed-tokens", type=int, default=65536)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--steps", type=int, default=1_000_000)
    settings = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    settings.out.mkdir(parents=True, exist_ok=True)
    packed = Packed(settings.parts)
    dtype = torch.bfloat16
    model = Model(packed, settings.rank, settings.alpha, settings.device, dtype)
    print(f"loaded after {time.monotonic() - began:.0f} s", flush=True)
    if not settings.no_compile:
        model.compile()
        try:
            model.embed([[1, 2, 3]] * 4, 1024)
            model.scores([[1, 2, 3]] * 4).sum().backward()
            model.zero_grad(set_to_none=True)
        except Exception as error:
            print(f"not compiled: {error!r:.300}", flush=True)
            model._run = Layer.forward
    rows = Rows(packed, model, settings.embed_tokens)
    judged = packed.texts("judged")
    groups = [
        {
            "params": [parameter for name, parameter in model.named_parameters() if "head" not in name],
            "rate": settings.rate,
        },
        {"params": list(model.head.parameters()), "rate": settings.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))
    rng = np.random.default_rng(0)
    order, cursor, step, tokens, drawn = rng.permutation(len(rows.queries)), 0, 0, 0, []
    started = validated = time.monotonic()
    curve = (settings.out / "curve.jsonl").open("a", encoding="utf-8")

    def log(line: dict) -> None:
        line = {"step": step, "seconds": round(time.monotonic() - began, 1), **line}
        curve.write(json.dumps(line) + "\n")
        curve.flush()
        print(json.dumps(line), flush=True)

    while (spent := (time.monotonic() - started) / max(1.0, settings.seconds - (started - began))) < 1:
        if step >= settings.steps:
            break
        step += 1
        share = min(1.0, step / settings.warmup) * min(1.0, (1 - spent) / (1 - settings.steady))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share
        batch = []
        while len(batch) < settings.queries:
            if cursor == len(order):
                order, cursor = rng.permutation(len(order)), 0
            row = rows.draw(int(order[cursor]), rng, settings.size)
            cursor += 1
            if row is not None and len(row["documents"]) == settings.size:
                batch.append(row)
        limit = 384 if step % 5 == 0 else int(rng.choice((128, 160, 192)))
        # Sorted by length, so that micro-batches have little padding.
        batch.sort(key=lambda row: sum(min(len(text), limit) for text in row["texts"]))
        total = 0.0
        micro = max(1, settings.micro * 160 // max(160, limit))
        for start in range(0, len(batch), micro):
            part = batch[start : start + micro]
            texts = [
                pair(model.about, rows.queries[row["number"]], text, limit) for row in part for text in row["texts"]
            ]
            scores = model.scores(texts).view(len(part), settings.size)
            labels, relevance = (
                torch.tensor(np.stack([row[name] for row in part]), dtype=torch.float32, device=settings.device)
                for name in ("labels", "relevance")
            )
            loss = losses(scores, labels, relevance, settings.pointwise).sum() / len(batch)
            loss.backward()
            total += float(loss.detach())
            tokens += sum(map(len, texts))
        size = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        drawn += [(row["number"], row["documents"], row["cosines"].round(4).tolist()) for row in batch]
        if step % 10 == 0 or step == 1:
            rate = tokens / (time.monotonic() - started)
            saturated = float((torch.tanh(scores.detach() / 2).abs() > 0.99).float().mean())
            log({"loss": round(total, 4), "norm": round(float(size), 2), "saturated": saturated, "tokens/s": int(rate)})
        if time.monotonic() - validated > settings.validate_every:
            log({"ndcg": validate(model, rows, judged)})
            write(model, settings.out, step)
            validated = time.monotonic()
    log({"ndcg": validate(model, rows, judged)})
    write(model, settings.out, step)
    numbers = {
        "query": np.array([row[0] for row in drawn], dtype=np.int32),
        "documents": np.array([row[1] for row in drawn], dtype=np.int32),
        "cosines": np.array([row[2] for row in drawn], dtype=np.float16),
    }
    np.savez_compressed(settings.out / "rows.npz", **numbers)


def write(model: Model, out: Path, step: int) -> None:
    """Write adapters and head as raw bfloat16, in files of 15 MB."""
    arrays = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    bits = torch.cat([array.flatten() for array in arrays.values()]).bfloat16().view(torch.int16).numpy().tobytes()
    for number, start in enumerate(range(0, len(bits), FILE_BYTES)):
        (out / f"adapters.{number}.bin").write_bytes(bits[start : start + FILE_BYTES])
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    (out / "adapters.json").write_text(json.dumps({"step": step, "shapes": shapes}), encoding="utf-8")


if __name__ == "__main__":
    main()
