"""The ensemble of teachers: what each says of a list, and how much it counts, found on held-back human labels.

`python -m recipes.default_model.teachers` finds the weights by a conditional logit (a linear listwise model) on lists
of held-back queries: a label is then the log-probability that a person would pick the document.
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
# Nats that a person's choice of a document adds, and that its being the origin of a written query adds.
HUMAN, ORIGIN = 2.0, 1.5
# Lists of a source by which weights are found.
LISTS = 60


@dataclass(frozen=True)
class Query:
    """A query with all that finding its candidates needs.

    Args:
        name: Its id, if it is a human one.
        text: The text.
        native: In cross-lingual cases, a text in the documents' language for BM25.
    """

    name: str
    text: str
    native: str = ""


class Judges:
    """The teachers over one source.

    Args:
        source: The source.
        cache: Folder of the embeddings.
    """

    def __init__(self, source: sources.Source, cache: Path):
        self.source, self.ids = source, list(source.documents)
        self._places = {each: place for place, each in enumerate(self.ids)}
        self.bm25 = BM25(source.documents)
        self._caches, self._documents = {}, {}
        for encoder in ENCODERS:
            found = embed.Cache(cache / encoder / source.name)
            texts = list(embed.texts_of(source, encoder)[0].values())
            if not found.missing(texts):
                self._caches[encoder] = found
                self._documents[encoder] = found.get(texts)

    @property
    def encoders(self) -> list[str]:
        """Those whose embeddings of all documents are there."""
        return list(self._caches)

    def knows(self, query: Query) -> bool:
        """Whether the strong encoder has read a query and all documents."""
        cache = self._caches.get("embeddinggemma")
        return cache is not None and not cache.missing([embed.query_text(query.text, "embeddinggemma")])

    def nearest(self, query: Query, depth: int, encoder: str = "embeddinggemma") -> list[str]:
        """Documents by cosine, best first."""
        scores = self._cosines(query, encoder)
        depth = min(depth, len(scores))
        best = np.argpartition(-scores, depth - 1)[:depth]
        return [self.ids[place] for place in best[np.argsort(-scores[best])]]

    def by_words(self, query: Query, depth: int) -> list[str]:
        """Documents by BM25, best first; of judged lists, the list."""
        if query.name in self.source.queries and not query.native:
            return ranked_by_bm25(self.source, self.bm25, query.name, depth)
        return [each for each, _ in self.bm25.search([query.native or query.text], depth)[0]]

    def scores(self, query: Query, documents: list[str]) -> dict[str, list[float]]:
        """What each teacher says: cosines, and BM25 as a share of the query's best score."""
        places = [self._places[each] for each in documents]
        found = {}
        for encoder, cache in self._caches.items():
            if not cache.missing([embed.query_text(query.text, encoder)]):
                found[encoder] = self._cosines(query, encoder)[places].tolist()
        words = np.array(self.bm25.scores(query.text, self.ids))
        found["bm25"] = (words[places] / max(words.max(), 1e-6)).tolist()
        return found

    def _cosines(self, query: Query, encoder: str) -> np.ndarray:
        text = embed.query_text(query.text, encoder)
        return self._documents[encoder] @ self._caches[encoder].get([text])[0]


class Ensemble:
    """Weights of the teachers, by which of them there are."""

    def __init__(self, weights: dict[str, dict[str, float]]):
        self.weights = weights

    @classmethod
    def load(cls, path: Path) -> Ensemble:
        """Read what `main` has written."""
        return cls(json.loads(path.read_text(encoding="utf-8"))["weights"])

    def logits(self, scores: dict[str, list[float]]) -> np.ndarray:
        """Log-odds of relevance, up to what holds for the whole list."""
        known = _known(scores) if _known(scores) in self.weights else "embeddinggemma+bm25"
        weights = self.weights[known]
        return sum(weights[name] * np.array(scores[name]) for name in known.split("+")) + weights["offset"]


def _known(scores: dict[str, list[float]]) -> str:
    return "+".join(name for name in TEACHERS if name in scores)


def held_back_lists(judges: Judges) -> list[dict]:
    """Lists of held-back human queries: the best of each teacher, and the relevant documents."""
    source, lists = judges.source, []
    for name in sorted(source.queries, key=lambda each: sources.fraction("weights", each)):
        relevant, query = relevant_of(source, name), Query(name, source.queries[name])
        if len(lists) == LISTS:
            break
        if not all(sources.is_held_back(source.name, each) for each in relevant) or not judges.knows(query):
            continue
        documents = list(dict.fromkeys([*judges.by_words(query, 15)[:15], *relevant]))
        if name not in source.candidates:
            pages = {sources.page_of(source.name, each) for each in relevant}
            near = judges.nearest(query, 15)
            documents += [
                each for each in near if each not in documents and sources.page_of(source.name, each) not in pages
            ]
        scores = judges.scores(query, documents)
        lists.append({"scores": scores, "labels": [relevant.get(each, 0.0) for each in documents]})
    return lists


def fit(lists: list[dict], names: list[str]) -> dict[str, float]:
    """Weights and offset of some teachers, by likelihood: of the list's relevant one, and of each document's label."""
    features = [torch.tensor(np.stack([each["scores"][name] for name in names], 1)).float() for each in lists]
    targets = [(torch.tensor(each["labels"]) > 0).float() for each in lists]
    weights = torch.full((len(names),), 5.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        terms = [
            -((each @ weights).log_softmax(0) * target).sum() / target.sum()
            for each, target in zip(features, targets, strict=True)
        ]
        total = torch.stack(terms).mean()
        total.backward()
        return total

    optimizer.step(loss)
    logits = torch.cat([each @ weights for each in features]).detach()
    wanted, low, high = torch.cat(targets).sum(), -60.0, 60.0
    for _ in range(60):
        # The offset with which as many are expected to be relevant as are.
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(logits + middle).sum() < wanted else (low, middle)
    found = {name: round(value, 4) for name, value in zip(names, weights.tolist(), strict=True)}
    return found | {"offset": round(middle, 4)}


def main() -> None:
    """Find the weights, and write them with the nDCG@10 of each teacher and of the ensemble."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/default_model/embeddings"))
    parser.add_argument("--out", type=Path, default=Path("runs/default_model/teachers.json"))
    settings = parser.parse_args()
    by_source = {}
    for name in sources.names(settings.data, "general"):
        if not (settings.cache / "embeddinggemma" / name).exists():
            continue
        found = held_back_lists(Judges(sources.load(settings.data, "general", name), settings.cache))
        if len(found) >= 5:
            by_source[name] = found
            print(f"{name}: {len(found)} lists", flush=True)
    lists = [each for found in by_source.values() for each in found]
    weights = {"embeddinggemma+bm25": fit(lists, ["embeddinggemma", "bm25"])}
    english = [each for each in lists if "mpnet" in each["scores"]]
    if len(english) >= 100:
        weights["embeddinggemma+mpnet+bm25"] = fit(english, list(TEACHERS))
    ensemble = Ensemble(weights)
    table = {}
    for name, found in by_source.items():
        kinds = {teacher: [] for teacher in TEACHERS if teacher in found[0]["scores"]} | {"ensemble": [], "random": []}
        for each in found:
            for kind in kinds:
                if kind == "random":
                    value = random_ndcg(each["labels"])
                else:
                    scores = ensemble.logits(each["scores"]) if kind == "ensemble" else each["scores"][kind]
                    value = ndcg(each["labels"], list(scores))
                kinds[kind].append(value)
        table[name] = {kind: round(100 * float(np.mean(values)), 1) for kind, values in kinds.items()}
        table[name]["lists"] = len(found)
    settings.out.write_text(json.dumps({"weights": weights, "ndcg@10": table}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(weights, indent=1))


if __name__ == "__main__":
    main()
