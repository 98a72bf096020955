"""Model cards of what this package makes: front matter that the Hub reads, where a model comes from, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..folder_querit import USAGE

_EXPORTED = """# {name}

`{source}`, a Querit reranker ([arXiv 2606.19037](https://arxiv.org/abs/2606.19037)), as `{architecture}` with one
label, for servers that run no code of a repository. The relevance score is the tanh of its logit, in [-1, 1].

The logit has a bias, {bias}. vLLM adds it; transformers and sentence-transformers have no place for it, say that
`score.bias` is unexpected, and give logits without it: lower or higher by the same for all documents, in the same
order (in bfloat16, in which transformers computes them for weights of that dtype, close ones may swap). The head is in
float32, in which vLLM computes it whatever the other weights are in.

The text of a pair comes from the chat template (roles `system`: instruction, `query`, `title`, `document`) and ends in
`[CLS]`, whose state is read.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
model.rank("who wrote Faust", ["Goethe finished Faust in 1831.", "A fist is a closed hand."])
```

vLLM uses a chat template only where it is named, as a file:

```bash
vllm serve {name} --runner pooling --chat-template {name}/chat_template.jinja
```
"""

_TAGS = ["reranker", "cross-encoder", "sentence-transformers", "querit"]


def merged_card(name: str, recipe: Mapping[str, Any]) -> str:
    """The card of a merged model, which names its parents.

    Args:
        name: Of the model.
        recipe: As in `merge.json`.
    """
    parents = [recipe["base"], *recipe["models"]] if recipe["base"] else recipe["models"]
    repositories = list(filter(None, (_repository_of(str(each)) for each in parents)))
    data = _card_data(tags=[*_TAGS, "merge"])
    if repositories:
        data.base_model, data.base_model_relation = repositories, "merge"
    shown = ("t", "weights", "scale") if recipe["base"] else ("t", "weights")
    settings = [f"{key} {_plain(recipe[key])}" for key in shown if recipe[key]]
    lines = [
        f"# {name}",
        "",
        f"A Querit reranker, merged by `querit merge` ({', '.join([recipe['method'], *settings])}) from",
        "",
        *(f"- `{each}`" for each in recipe["models"]),
        *(["", f"with the task vectors taken from `{recipe['base']}`."] if recipe["base"] else []),
        "",
        "`merge.json` holds the recipe and the hashes of the parents. What the licence of a parent asks for, it asks",
        "for here too.",
        "The method is Querit-Reranker ([arXiv 2606.19037](https://arxiv.org/abs/2606.19037)).",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n\n" + USAGE.replace("{name}", name)


def exported_card(name: str, architecture: str, source: str, bias: float) -> str:
    """The card of an export, which says what its scores leave out.

    Args:
        name: Of the export.
        architecture: The class of transformers that loads it.
        source: What was exported.
        bias: Of its one logit.
    """
    data = _card_data(tags=_TAGS)
    data.base_model = _repository_of(source)
    shown = Path(source).resolve().name if Path(source).is_dir() else source
    return f"---\n{data.to_yaml()}\n---\n\n" + _EXPORTED.replace("{name}", name).replace(
        "{architecture}", architecture
    ).replace("{source}", shown).replace("{bias}", f"{bias:.6g}")


def _card_data(tags: list[str]) -> ModelCardData:
    return ModelCardData(library_name="transformers", pipeline_tag="text-ranking", tags=tags)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _repository_of(source: str) -> str | None:
    """Without the revision; None for what is no repository."""
    name = source.partition("@")[0]
    if Path(source).exists() or name.count("/") != 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
