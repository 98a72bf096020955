"""The ensemble of teachers: their scores, and the weights with which they are combined.

`python -m recipes.default_model.teachers` fits the weights on the relevance judgements of validation queries, by a
conditional logit (a linear listwise model): logits are log-probabilities that a person picks the document, up to a
constant per list.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import embed, sources
from .human_rows import ranked_by_bm25, relevant_of
from .measure import ndcg, random_ndcg
from .package import BM25

ENCODERS = ("embeddinggemma", "mpnet")
TEACHERS = (*ENCODERS, "bm25")
# Nats added to the logit of a document that a person judged relevant, and of the origin of a written query.
HUMAN, ORIGIN = 2.0, 1.5
# Lists per source on which the weights are fitted.
LISTS = 60


@dataclass(frozen=True)
class Query:
    """A query, with the text by which BM25 retrieves its candidates.

    Args:
        name: Id of the query.
        text: Text of the query.
        native: Text in the documents' language for BM25, if the query is cross-lingual.
    """

    name: str
    text: str
    native: str = ""


class Judges:
    """The teachers on one source.

    Args:
        source: Source of the documents.
        cache: Folder of the cached embeddings.
    """

    def __init__(self, source: sources.Source, cache: Path):
        self.source, self.ids = source, list(source.documents)
        self._indices = {document: index for index, document in enumerate(self.ids)}
        self.bm25 = BM25(source.documents)
        self._caches, self._documents = {}, {}
        for encoder in ENCODERS:
            embeddings = embed.Cache(cache / encoder / source.name)
            texts = list(embed.texts_of(source, encoder)[0].values())
            if not embeddings.missing(texts):
                self._caches[encoder] = embeddings
                self._documents[encoder] = embeddings.get(texts)

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders that have embedded all documents."""
        return list(self._caches)

    def knows(self, query: Query) -> bool:
        """Whether the strong encoder has embedded a query and all documents."""
        cache = self._caches.get("embeddinggemma")
        return cache is not None and not cache.missing([embed.query_text(query.text, "embeddinggemma")])

    def nearest(self, query: Query, depth: int, encoder: str = "embeddinggemma") -> list[str]:
        """Documents by cosine, best first."""
        scores = self._cosines(query, encoder)
        depth = min(depth, len(scores))
        best = np.argpartition(-scores, depth - 1)[:depth]
        return [self.ids[index] for index in best[np.argsort(-scores[best])]]

    def by_words(self, query: Query, depth: int) -> list[str]:
        """Documents by BM25, best first; the candidate list where the source has one."""
        if query.name in self.source.queries and not query.native:
            return ranked_by_bm25(self.source, self.bm25, query.name, depth)
        return [document for document, _ in self.bm25.search([query.native or query.text], depth)[0]]

    def scores(self, query: Query, documents: list[str]) -> dict[str, list[float]]:
        """Scores by teacher: cosines, and BM25 divided by the query's maximum."""
        indices = [self._indices[document] for document in documents]
        scores = {}
        for encoder, cache in self._caches.items():
            if not cache.missing([embed.query_text(query.text, encoder)]):
                scores[encoder] = self._cosines(query, encoder)[indices].tolist()
        words = np.array(self.bm25.scores(query.text, self.ids))
        scores["bm25"] = (words[indices] / max(words.max(), 1e-6)).tolist()
        return scores

    def _cosines(self, query: Query, encoder: str) -> np.ndarray:
        text = embed.query_text(query.text, encoder)
        return self._documents[encoder] @ self._caches[encoder].get([text])[0]


class Ensemble:
    """A linear combination of teachers.

    Args:
        weights: Available teachers, joined by `+` -> weights by teacher, and the `offset`.
    """

    def __init__(self, weights: dict[str, dict[str, float]]):
        self.weights = weights

    @classmethod
    def load(cls, path: Path) -> Ensemble:
        """Load the weights that `main` has written."""
        return cls(json.loads(path.read_text(encoding="utf-8"))["weights"])

    def logits(self, scores: dict[str, list[float]]) -> np.ndarray:
        """Log-odds of relevance, up to a constant per list."""
        key = _key_of(scores) if _key_of(scores) in self.weights else "embeddinggemma+bm25"
        weights = self.weights[key]
        return sum(weights[name] * np.array(scores[name]) for name in key.split("+")) + weights["offset"]


def _key_of(scores: dict[str, list[float]]) -> str:
    return "+".join(name for name in TEACHERS if name in scores)


def held_out_lists(judges: Judges) -> list[dict]:
    """Lists of human validation queries: the top documents of BM25 and the encoder, and the relevant ones."""
    source, lists = judges.source, []
    for name in sorted(source.queries, key=lambda query: sources.fraction("weights", query)):
        relevant, query = relevant_of(source, name), Query(name, source.queries[name])
        if len(lists) == LISTS:
            break
        if not all(sources.is_held_out(source.name, document) for document in relevant) or not judges.knows(query):
            continue
        documents = list(dict.fromkeys([*judges.by_words(query, 15)[:15], *relevant]))
        if name not in source.candidates:
            pages = {sources.page_of(source.name, document) for document in relevant}
            near = judges.nearest(query, 15)
            documents += [
                document
                for document in near
                if document not in documents and sources.page_of(source.name, document) not in pages
            ]
        scores = judges.scores(query, documents)
        lists.append({"scores": scores, "labels": [relevant.get(document, 0.0) for document in documents]})
    return lists


def fit(lists: list[dict], names: list[str]) -> dict[str, float]:
    """Fit weights by the likelihood of the relevant documents, and the offset by their expected number."""
    features = [torch.tensor(np.stack([row["scores"][name] for name in names], 1)).float() for row in lists]
    targets = [(torch.tensor(row["labels"]) > 0).float() for row in lists]
    weights = torch.full((len(names),), 5.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        terms = [
            -((feature @ weights).log_softmax(0) * target).sum() / target.sum()
            for feature, target in zip(features, targets, strict=True)
        ]
        total = torch.stack(terms).mean()
        total.backward()
        return total

    optimizer.step(loss)
    logits = torch.cat([feature @ weights for feature in features]).detach()
    relevant, low, high = torch.cat(targets).sum(), -60.0, 60.0
    for _ in range(60):
        # Bisection for the offset at which the expected number of relevant documents is the actual one.
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(logits + middle).sum() < relevant else (low, middle)
    fitted = {name: round(value, 4) for name, value in zip(names, weights.tolist(), strict=True)}
    return fitted | {"offset": round(middle, 4)}


def main() -> None:
    """Fit the weights, and write them with the nDCG@10 of every teacher and of the ensemble."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/default_model/embeddings"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/teachers.json"))
    settings = parser.parse_args()
    by_source = {}
    for name in sources.names(settings.data, "general"):
        if not (settings.cache / "embeddinggemma" / name).exists():
            continue
        source_lists = held_out_lists(Judges(sources.load(settings.data, "general", name), settings.cache))
        if len(source_lists) >= 5:
            by_source[name] = source_lists
            print(f"{name}: {len(source_lists)} lists", flush=True)
    lists = [row for source_lists in by_source.values() for row in source_lists]
    weights = {"embeddinggemma+bm25": fit(lists, ["embeddinggemma", "bm25"])}
    english = [row for row in lists if "mpnet" in row["scores"]]
    if len(english) >= 100:
        weights["embeddinggemma+mpnet+bm25"] = fit(english, list(TEACHERS))
    ensemble = Ensemble(weights)
    table = {}
    for name, source_lists in by_source.items():
        available = [teacher for teacher in TEACHERS if teacher in source_lists[0]["scores"]]
        kinds: dict[str, list[float]] = {kind: [] for kind in (*available, "ensemble", "random")}
        for row in source_lists:
            for kind in kinds:
                if kind == "random":
                    value = random_ndcg(row["labels"])
                else:
                    scores = ensemble.logits(row["scores"]) if kind == "ensemble" else row["scores"][kind]
                    value = ndcg(row["labels"], list(scores))
                kinds[kind].append(value)
        table[name] = {kind: round(100 * float(np.mean(values)), 1) for kind, values in kinds.items()}
        table[name]["lists"] = len(source_lists)
    settings.out.write_text(json.dumps({"weights": weights, "ndcg@10": table}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(weights, indent=1))


if __name__ == "__main__":
    main()
