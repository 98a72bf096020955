"""Querit rerankers as models of mteb, in place of its own wrapper, which pads every pair to 4,095 tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import key_of
from ..checkpoints.identity import identity_of
from ..checkpoints.loading import default_device, load_model
from ..checkpoints.mini import MINI_NAME

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

    from .evaluate import Reranker

_CITATION = "arXiv 2606.19037"


class MtebReranker:
    """A cross-encoder of mteb that scores by `predict`, without padding and with one shared prefix per query.

    Scores are those of mteb's `QueritWrapper`, up to rounding.

    Args:
        model_name: Name of the model in mteb.
        revision: Revision in mteb; not used for folders.
        device: Device to compute on; by default a GPU if there is one.
        source: "mini", or the folder or repository to load; by default the name.
        model: A reranker that is loaded already.
        **kwargs: Keyword arguments of `predict`, such as `max_length`.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        source: str | None = None,
        model: Reranker | None = None,
        **kwargs: Any,
    ):
        self.model = model or load_model(source or model_name, device=device or default_device())
        self.predict_options = {"show_progress_bar": False, **kwargs}

    def predict(self, inputs1: Any, inputs2: Any, **_: Any) -> list[float]:
        """Score pairs of queries and documents.

        Args:
            inputs1: Batches of queries, `{"text": [...]}`, and perhaps of their instructions; one query for each pair.
            inputs2: Batches of documents.
            **_: Details of the task from mteb, which change nothing.

        Returns:
            A score in [-1, 1] for each pair.
        """
        queries, documents = _column(inputs1, "text"), _column(inputs2, "text")
        # As mteb's wrapper decides it.
        has_instructions = "instruction" in getattr(inputs2.dataset, "features", ())
        instructions = _column(inputs1, "instruction") if has_instructions else [None] * len(queries)
        scores = [0.0] * len(queries)
        for instruction in dict.fromkeys(instructions):
            rows = [row for row, of_row in enumerate(instructions) if of_row == instruction]
            pairs = [(queries[row], documents[row]) for row in rows]
            options = self.predict_options | ({} if instruction is None else {"instruction": instruction})
            for row, score in zip(rows, self.model.predict(pairs, **options), strict=True):
                scores[row] = float(score)
        return scores


def _column(batches: Iterable[Any], name: str) -> list[Any]:
    return [value for batch in batches for value in batch[name]]


def model_meta(name: str | os.PathLike[str]) -> ModelMeta:
    """Describe a reranker for mteb, with a loader that uses this package.

    Args:
        name: "mini", a folder, or a repository. Published checkpoints keep their entry of mteb's registry.

    Returns:
        The description; `load_model()` loads the reranker. A folder is called `local/FOLDER`, with a hash of its files
        as its revision.

    Example:
        ```python
        >>> import mteb
        >>> mteb.evaluate(model_meta("merged"), mteb.get_tasks(["SciDocsRR"]))
        ```
    """
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.model_meta import ModelMeta

    name = os.fspath(name)
    is_local = name == MINI_NAME or Path(name).is_dir()
    if not is_local and name in MODEL_REGISTRY:
        return MODEL_REGISTRY[name].model_copy(update={"loader": MtebReranker, "loader_kwargs": {}})
    short_name = name if name == MINI_NAME else Path(name).resolve().name
    return ModelMeta.create_empty(
        {
            # The path of a folder, which is nobody's business, is bound here rather than in `loader_kwargs`.
            "loader": partial(MtebReranker, source=name) if is_local else MtebReranker,
            "name": f"local/{short_name}" if is_local else name,
            "revision": key_of(identity_of(name)).hex() if is_local else None,
            "framework": ["PyTorch", "Transformers"],
            "model_type": ["cross-encoder"],
            "citation": _CITATION,
        }
    )


def register(name: str | os.PathLike[str]) -> ModelMeta:
    """Enter a reranker into mteb's registry, so that `mteb.get_model(name)` loads it by this package.

    Args:
        name: "mini", a folder, or a repository, also one of the published checkpoints.

    Example:
        ```python
        >>> register("merged")
        >>> mteb.get_model("merged")
        ```
    """
    from mteb.models.model_implementations import MODEL_REGISTRY

    meta = model_meta(name)
    MODEL_REGISTRY[os.fspath(name)] = meta
    return meta
