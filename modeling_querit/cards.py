"""Model cards: those of merged and converted models, and card templates with metrics from results files."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .console import printable
from .files import read_json, read_text
from .markdown import code, escape

# The stub that `save_pretrained` writes is in saving_querit.py: that file travels with every checkpoint, so it imports
# nothing from here.
from .saving_querit import CARD_STUB, python_text, usage

_TAGS = ["reranker", "cross-encoder", "sentence-transformers", "querit"]
_SEQ_CLS_CARD = """# {title}

{source}, a Querit reranker ([arXiv 2606.19037](https://arxiv.org/abs/2606.19037)), as `{architecture}` with one
label, for servers that run no code of a repository. The relevance score is the tanh of its logit, in [-1, 1].

The logit has a bias, {bias}. vLLM adds it. transformers and sentence-transformers have no place for it: they report
that `score.bias` is unexpected, and their logits lack this constant, which leaves the order as it is (in bfloat16, in
which transformers computes them for weights of that dtype, close ones may swap). The head is in float32, in which vLLM
computes it whatever the other weights are in.

The chat template formats the text of a pair (roles `system`: instruction, `query`, `title`, `document`); it ends in
`[CLS]`, whose hidden state the head reads.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
model.rank("who wrote Faust", ["Goethe finished Faust in 1831.", "A fist is a closed hand."])
```

vLLM uses a chat template only if it is given as a file:

```bash
vllm serve {folder} --runner pooling --chat-template {folder}/chat_template.jinja
```
"""

# Front matter key of a template: the metrics to show. `model-index` takes its place on the Hub.
RESULTS_KEY = "results"
# Where the table of metrics goes.
RESULTS_MARKER = "<!-- results -->"
_REQUIRED_KEYS = ("license", "library_name", "pipeline_tag", "language", "tags", "base_model")
# The relations between a model and its base model that the Hub knows.
_BASE_MODEL_RELATIONS = ("finetune", "adapter", "merge", "quantized")
_LANGUAGE = re.compile(r"^[a-z]{2,3}$|^multilingual$")
_STUB_SENTENCE = next(line for line in CARD_STUB.splitlines() if "Say here" in line)


# What a model inherits from those that it is made from

# A file with the notice that the licence of a model wants passed on.
NOTICE_FILE = "NOTICE"
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class InheritedMetadata:
    """Licence, languages, base models and notice files inherited from the models that a model is made from.

    Args:
        data: Fields of the front matter of a card.
        files: Licence and notice files, by name.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the licence and notice files."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")

    @property
    def section(self) -> str:
        """Section of a card with the notices; empty if there are none."""
        notices = [text.strip() for name, text in self.files.items() if name.startswith(NOTICE_FILE)]
        return "\n## Notices\n\n" + "\n\n".join(notices) + "\n" if notices else ""


def read_inherited(folder: Path) -> InheritedMetadata:
    """Read what models made from a folder inherit: front matter of its card, and its licence and notice files."""
    card, data = folder / "README.md", {}
    if card.is_file():
        with contextlib.suppress(ValueError):
            data = _parse(card.read_text(encoding="utf-8"), str(card)).data.to_dict()
    known = {key: data[key] for key in (*_LICENCE_KEYS, "language", "base_model_relation") if data.get(key)}
    base_models = [name for name in _as_list(data.get("base_model")) if _repository_of(str(name))]
    if base_models:
        known["base_model"] = base_models[0] if len(base_models) == 1 else base_models
        known.setdefault("base_model_relation", "finetune")
    else:
        known.pop("base_model_relation", None)
    paths = sorted(path for path in folder.iterdir() if path.name.startswith(("LICENSE", NOTICE_FILE)))
    return InheritedMetadata(known, {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths})


def combine_inherited(parents: Sequence[InheritedMetadata]) -> InheritedMetadata:
    """Combine what is inherited from several parents: all languages, base models and files; all licences by name."""
    data: dict[str, Any] = {}
    for key in ("language", "base_model"):
        values = list(dict.fromkeys(value for parent in parents for value in _as_list(parent.data.get(key))))
        if values:
            data[key] = values[0] if len(values) == 1 else values
    relations = {parent.data["base_model_relation"] for parent in parents if "base_model_relation" in parent.data}
    if relations and "base_model" in data:
        data["base_model_relation"] = "merge" if isinstance(data["base_model"], list) else min(relations)
    licences = [{key: parent.data[key] for key in _LICENCE_KEYS if key in parent.data} for parent in parents]
    licences = [licence for index, licence in enumerate(licences) if licence and licence not in licences[:index]]
    if len(licences) == 1:
        data |= licences[0]
    elif licences:
        names = dict.fromkeys(str(licence.get("license_name") or licence["license"]) for licence in licences)
        data |= {"license": "other", "license_name": "-and-".join(names)}
    files: dict[str, str] = {}
    for parent in parents:
        for name, text in parent.files.items():
            number = 1
            while files.get(_numbered(name, number), text) != text:
                number += 1
            files[_numbered(name, number)] = text
    return InheritedMetadata(data, files)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{Path(name).stem}-{number}{Path(name).suffix}"


# Cards that are generated


def stub_card(name: str, inherited: InheritedMetadata) -> str:
    """Write a card stub with the inherited metadata, for a conversion or a training.

    Args:
        name: Name of the model.
        inherited: Metadata inherited from its source.
    """
    text = CARD_STUB.split("---\n", 2)[2]
    front_matter = _card_data(_TAGS, **inherited.data).to_yaml()
    return f"---\n{front_matter}\n---\n{text}" + usage(name) + inherited.section


def merged_card(name: str, recipe: Mapping[str, Any], inherited: InheritedMetadata = InheritedMetadata()) -> str:
    """Write the card of a merged model, which names its parents.

    Args:
        name: Name of the merged model.
        recipe: Fields of the recipe, as in `merge.json`.
        inherited: Metadata inherited from the parents.
    """
    parents = [recipe["base"], *recipe["models"]] if recipe["base"] else recipe["models"]
    repositories = list(filter(None, (_repository_of(str(parent)) for parent in parents)))
    base_models = {"base_model": repositories, "base_model_relation": "merge"} if repositories else {}
    data = _card_data([*_TAGS, "merge"], **{**inherited.data, **base_models})
    shown = ("t", "weights", "scale") if recipe["base"] else ("t", "weights")
    settings = [f"{key} {_plain(recipe[key])}" for key in shown if recipe[key]]
    lines = [
        f"# {escape(name)}",
        "",
        f"A Querit reranker, merged by `querit merge` ({', '.join([recipe['method'], *settings])}) from",
        "",
        *(f"- {code(model)}" for model in recipe["models"]),
        *(["", f"with the task vectors taken from {code(recipe['base'])}."] if recipe["base"] else []),
        "",
        "`merge.json` holds the recipe and the hashes of the parents. The conditions of the parents' licences apply to",
        "this model too.",
        "The method is Querit-Reranker ([arXiv 2606.19037](https://arxiv.org/abs/2606.19037)).",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n\n" + usage(name) + inherited.section


def seq_cls_card(
    name: str, architecture: str, source: str, bias: float, inherited: InheritedMetadata = InheritedMetadata()
) -> str:
    """Write the card of a model converted to a sequence classifier, which explains its bias.

    Args:
        name: Name of the converted model.
        architecture: Class of transformers that loads it.
        source: Name of the model that was converted.
        bias: Bias of the one logit.
        inherited: Metadata inherited from that model.
    """
    repository = _repository_of(source)
    fields = dict(inherited.data)
    if repository:
        fields["base_model"] = repository
    data = _card_data(_TAGS, **fields)
    shown_source = Path(source).resolve().name if Path(source).is_dir() else source
    text = _SEQ_CLS_CARD
    for key, value in {
        "title": escape(name),
        "name": python_text(name),
        "folder": shlex.quote(printable(" ".join(name.split()))),
        "architecture": architecture,
        "source": code(shown_source),
        "bias": f"{bias:.6g}",
    }.items():
        text = text.replace(f"{{{key}}}", value)
    return f"---\n{data.to_yaml()}\n---\n\n{text}{inherited.section}"


def dropped_calibration(sources: Sequence[Any]) -> str:
    """Section of the card of a model that is not calibrated though one of its sources was; else empty.

    Args:
        sources: Configs of the models that it was made from.
    """
    if not any(getattr(config, "calibration", None) for config in sources):
        return ""
    return (
        "\n## Calibration\n\nThis model is made from a calibrated one, whose calibration it does not have: its scores "
        "are no\nprobabilities. `querit calibrate` calibrates a model in Querit's layout.\n"
    )


def _card_data(tags: list[str], **fields: Any) -> ModelCardData:
    return ModelCardData(library_name="transformers", pipeline_tag="text-ranking", tags=tags, **fields)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _repository_of(source: str) -> str | None:
    """Return the name of a repository without its revision; None for anything else."""
    name = source.partition("@")[0]
    if Path(source).exists() or name.count("/") != 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


# Card templates


def find_card(name: str) -> Path:
    """Find a card: a file, or a template of this package by its name, such as "adapted".

    Raises:
        FileNotFoundError: if there is neither; the message lists the templates.
    """
    if Path(name).is_file():
        return Path(name)
    templates = {path.stem: path for path in _template_folder().glob("*.md")}
    if name not in templates:
        raise FileNotFoundError(
            f"There is no card {name}: give a file, or one of the templates {', '.join(sorted(templates))}."
        )
    return templates[name]


def _template_folder() -> Path:
    """Return the folder of the templates: `hub_cards` in a clone, its copy in an installed package."""
    package = Path(__file__).parent
    installed = package / "release" / "cards"
    return installed if installed.is_dir() else package.parent / "hub_cards"


def render_card(path: Path, repo_id: str) -> str:
    """Fill in a card template: the name of the repository, and metrics from results files.

    The front matter lists the results files, and `<!-- results -->` marks the place of the table:

    ```yaml
    results:
    - {file: results/adaptation.json, column: adapted, metric: ndcg_at_10, name: nDCG@10}
    ```

    A results file is JSON with `rows`, each with a `collection` and columns of metrics, as the benchmarks write them;
    `source`, `{"name", "url"}`, is optional and applies to all rows. Values are multiplied by `scale` (1 by default).
    Files are relative to the working directory, or else to the folder above the card's (the clone of `hub_cards`).

    Args:
        path: Card template.
        repo_id: Name of the repository, which replaces `{name}`.

    Raises:
        OSError: if a results file is missing.
        ValueError: if the front matter cannot be parsed, a results file lacks the column, or the card has a place for
            the table and no results file, or the other way round.
    """
    card = _parse(read_text(path).replace("{name}", repo_id), str(path))
    data = card.data.to_dict()
    entries = data.pop(RESULTS_KEY, None) or []
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {RESULTS_KEY} must be a list of entries with file, column and metric.")
    if bool(entries) != (RESULTS_MARKER in card.text):
        raise ValueError(f"{path}: {RESULTS_KEY} in the front matter and {RESULTS_MARKER} in the text go together.")
    metrics: list[EvalResult] = []
    for entry in entries:
        if missing := {"file", "column", "metric"} - (entry.keys() if isinstance(entry, Mapping) else set()):
            raise ValueError(f"{path}: an entry of {RESULTS_KEY} has no {min(missing)}.")
        if not isinstance(entry["file"], str) or not _is_number(entry.get("scale", 1)):
            raise ValueError(f"{path}: in {RESULTS_KEY}, file must be the name of a file, and scale a number.")
        metrics += _read_metrics(entry, _results_file(entry["file"], path), repo_id)
    if metrics:
        data["model-index"] = eval_results_to_model_index(repo_id.split("/")[-1], metrics)
    text = card.text.replace(RESULTS_MARKER, _table(metrics))
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text}"


def _results_file(name: str, card: Path) -> Path:
    # Not resolved: a card may be a link.
    beside_cards = card.absolute().parents[1] / name
    return beside_cards if beside_cards.is_file() and not Path(name).is_file() else Path(name)


def _read_metrics(entry: Mapping[str, Any], path: Path, repo_id: str) -> Iterator[EvalResult]:
    rows, source = _read_results(path)
    for row in rows:
        column = entry["column"]
        if not _is_number(row.get(column)) or "collection" not in row:
            raise ValueError(f"{path}: the row of {row.get('collection')} has no {column!r}, which the card shows.")
        yield EvalResult(
            task_type="text-ranking",
            dataset_type=row["collection"],
            dataset_name=row["collection"],
            metric_type=entry["metric"],
            metric_name=entry.get("name", entry["metric"]),
            metric_value=round(float(row[column]) * entry.get("scale", 1), 2),
            source_name=source.get("name") or entry["file"],
            # The Hub requires an address with a name.
            source_url=source.get("url") or f"https://huggingface.co/{repo_id}",
        )


def _read_results(path: Path) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """Read the rows of a results file, and their source."""
    try:
        results = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a results file ({error}).") from None
    rows = results.get("rows") if isinstance(results, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path} is not a results file: it has no list of rows.")
    source = results.get("source") or {}
    if not isinstance(source, Mapping):
        raise ValueError(f"{path}: source must be an object with name and url.")
    return rows, source


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(metrics: Sequence[EvalResult]) -> str:
    rows = [
        f"| {escape(metric.dataset_name)} | {escape(metric.metric_name)} | {metric.metric_value:.2f} |"
        for metric in metrics
    ]
    return "\n".join(["| collection | metric | |", "| --- | --- | ---: |", *rows])


def _parse(text: str, name: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (TypeError, ValueError, YAMLError) as error:
        raise ValueError(f"The front matter of {name} cannot be parsed: {error}.") from None


# Checks before a release


def find_card_problems(text: str, name: str = "README.md") -> list[str]:
    """List what the Hub or its visitors would miss in a card, one sentence each.

    Args:
        text: Card with its front matter.
        name: Name of the card in the sentences.
    """
    try:
        data = _parse(text, name).data.to_dict()
    except ValueError as error:
        return [str(error)]
    problems = [f"{name} does not state {key} in its front matter." for key in _REQUIRED_KEYS if not data.get(key)]
    if data.get("pipeline_tag") not in (None, "text-ranking"):
        problems.append(f"{name} has pipeline_tag {data['pipeline_tag']!r}: a reranker's is text-ranking.")
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not _LANGUAGE.match(str(language)):
            problems.append(f"{name} names the language {language!r}: the Hub knows ISO 639 codes, such as en.")
    problems += _find_base_model_problems(data, name)
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append(f"{name} has the license 'other' and no license_name.")
    if RESULTS_KEY in data:
        problems.append(f"{name} is a template that was not filled in: give it with --card.")
    if _STUB_SENTENCE in text:
        problems.append(f"{name} is the stub: say what the model was trained on, and under which licence it comes.")
    if unfilled := re.search(r"\{(name|TODO)[^}\n]*\}|\bTODO\b", text):
        problems.append(f"{name} still has {unfilled[0]}: fill it in.")
    return problems


def _find_base_model_problems(data: Mapping[str, Any], name: str) -> Iterator[str]:
    base_models = data.get("base_model") or []
    if base_models and data.get("base_model_relation") not in _BASE_MODEL_RELATIONS:
        yield f"{name} does not state base_model_relation ({', '.join(_BASE_MODEL_RELATIONS)})."
    for base_model in [base_models] if isinstance(base_models, str) else base_models:
        try:
            validate_repo_id(str(base_model))
        except HFValidationError:
            yield f"{name} names the base_model {base_model!r}, which is not a repository: give OWNER/NAME."
