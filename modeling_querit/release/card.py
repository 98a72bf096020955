"""A model card as it goes to the Hub: its text, and figures that come from results files alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .folder import STUB_SENTENCE

# In a card's front matter: which figures it shows. The Hub never sees it; `model-index` takes its place.
RESULTS_KEY = "results"
# Where the table goes.
RESULTS_PLACE = "<!-- results -->"
_NEEDED = ("license", "library_name", "pipeline_tag", "language", "tags", "base_model")
# What the Hub knows of a model and its base.
_RELATIONS = ("finetune", "adapter", "merge", "quantized")
_LANGUAGE = re.compile(r"^[a-z]{2,3}$|^multilingual$")


def render_card(path: Path, repo_id: str, root: Path | None = None) -> str:
    """Read a card, and put in the name of the repository and the figures of the results files that it names.

    The front matter names them so, and `<!-- results -->` says where the table goes:

    ```yaml
    results:
    - {file: results/adaptation.json, column: adapted, metric: ndcg_at_10, name: nDCG@10}
    ```

    A results file is JSON with `rows`, each with a `collection` and columns of figures, as the benchmarks write them;
    optionally `source`, `{"name", "url"}`, of all rows. `scale` (1 by default) multiplies.

    Args:
        path: The card.
        repo_id: What `{name}` in it stands for.
        root: What files are relative to; by default the working directory.

    Raises:
        OSError: if a results file is missing.
        ValueError: if the front matter cannot be read, a file has no such column, or the card asks for a table and
            names no file, or the other way round.
    """
    card = _read(path.read_text(encoding="utf-8").replace("{name}", repo_id), str(path))
    asked = card.data.to_dict().pop(RESULTS_KEY, None) or []
    data = {key: value for key, value in card.data.to_dict().items() if key != RESULTS_KEY}
    if not isinstance(asked, list):
        raise ValueError(f"{path}: {RESULTS_KEY} is a list of entries with file, column and metric.")
    if bool(asked) != (RESULTS_PLACE in card.text):
        raise ValueError(f"{path}: {RESULTS_KEY} in the front matter and {RESULTS_PLACE} in the text go together.")
    for each in asked:
        if missing := {"file", "column", "metric"} - (each.keys() if isinstance(each, Mapping) else set()):
            raise ValueError(f"{path}: an entry of {RESULTS_KEY} has no {min(missing)}.")
        if not isinstance(each["file"], str) or not _is_number(each.get("scale", 1)):
            raise ValueError(f"{path}: in {RESULTS_KEY}, file is the name of a file, and scale a number.")
    figures = [figure for each in asked for figure in _figures(each, (root or Path()) / each["file"], repo_id)]
    if figures:
        data["model-index"] = eval_results_to_model_index(repo_id.split("/")[-1], figures)
    text = card.text.replace(RESULTS_PLACE, _table(figures))
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text}"


def _figures(asked: Mapping[str, Any], path: Path, repo_id: str) -> Iterator[EvalResult]:
    rows, source = _results_of(path)
    for row in rows:
        column = asked["column"]
        if not _is_number(row.get(column)) or "collection" not in row:
            raise ValueError(f"{path}: the row of {row.get('collection')} has no {column!r}, which the card shows.")
        yield EvalResult(
            task_type="text-ranking",
            dataset_type=row["collection"],
            dataset_name=row["collection"],
            metric_type=asked["metric"],
            metric_name=asked.get("name", asked["metric"]),
            metric_value=round(float(row[column]) * asked.get("scale", 1), 2),
            source_name=source.get("name") or asked["file"],
            # The Hub takes a name only together with an address.
            source_url=source.get("url") or f"https://huggingface.co/{repo_id}",
        )


def _results_of(path: Path) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """The rows of a results file, and where they are from."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no results file ({error}).") from None
    rows = found.get("rows") if isinstance(found, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path} is no results file: it has no list of rows.")
    source = found.get("source") or {}
    if not isinstance(source, Mapping):
        raise ValueError(f"{path}: source is an object with name and url.")
    return rows, source


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(figures: Sequence[EvalResult]) -> str:
    rows = [f"| {each.dataset_name} | {each.metric_name} | {each.metric_value:.2f} |" for each in figures]
    return "\n".join(["| collection | metric | |", "| --- | --- | ---: |", *rows])


def _read(text: str, name: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (TypeError, ValueError, YAMLError) as error:
        raise ValueError(f"{name} has no front matter that can be read: {error}.") from None


def problems_of_card(text: str) -> list[str]:
    """What the Hub, or its visitors, would miss in a card, a sentence each."""
    try:
        data = _read(text, "README.md").data.to_dict()
    except ValueError as error:
        return [str(error)]
    problems = [f"README.md does not state {key} in its front matter." for key in _NEEDED if not data.get(key)]
    if data.get("pipeline_tag") not in (None, "text-ranking"):
        problems.append(f"README.md has pipeline_tag {data['pipeline_tag']!r}: a reranker's is text-ranking.")
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not _LANGUAGE.match(str(language)):
            problems.append(f"README.md names the language {language!r}: the Hub knows ISO 639 codes, such as en.")
    problems += _problems_of_bases(data)
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append("README.md has the license 'other' and no license_name.")
    if RESULTS_KEY in data:
        problems.append("README.md is a card that was not rendered: give it with --card.")
    if STUB_SENTENCE in text:
        problems.append("README.md is the stub: say what the model was trained on, and under which licence it comes.")
    if unfilled := re.search(r"\{(name|TODO)[^}\n]*\}|\bTODO\b", text):
        problems.append(f"README.md has {unfilled[0]} left to be filled in.")
    return problems


def _problems_of_bases(data: Mapping[str, Any]) -> Iterator[str]:
    bases = data.get("base_model") or []
    if bases and data.get("base_model_relation") not in _RELATIONS:
        yield f"README.md does not state base_model_relation ({', '.join(_RELATIONS)})."
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            validate_repo_id(str(base))
        except HFValidationError:
            yield f"README.md names the base_model {base!r}, which is no repository: OWNER/NAME."
