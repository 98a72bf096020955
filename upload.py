"""Release a reranker on the Hub: python upload.py FOLDER --repo-id OWNER/NAME [--card CARD] [--dry-run]

The folder is first looked at as a stranger would: it is loaded by AutoModel and CrossEncoder in a process that does
not know this package, and has to give the scores that are recorded in it. Then it goes up in one commit, and comes down
again to be compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modeling_querit.release.card import problems_of_card, render_card
from modeling_querit.release.folder import files_of, problems_of, problems_of_text
from modeling_querit.release.publish import Destination, Files, publish
from modeling_querit.release.reference import REFERENCE_FILE, check_scores, read_reference, reference_of

ROOT = Path(__file__).parent


def main(
    folder: Annotated[Path, typer.Argument(help="What save_pretrained, querit train, adapt, merge or convert wrote.")],
    repo_id: Annotated[str, typer.Option(help="OWNER/NAME on the Hub.", show_default=False)],
    card: Annotated[
        Path | None, typer.Option(help="A card of hub_cards/, in the place of the folder's README.md.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you see a repository that is made for it.")] = False,
    revision: Annotated[str, typer.Option(help="The branch.")] = "main",
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of writing to the branch.")] = False,
    tag: Annotated[str | None, typer.Option(help="A name for this state, such as v1.0.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload reranker",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; send nothing.")] = False,
) -> None:
    """Check a folder as a stranger would, show what will be sent, send it in one commit, and compare what arrived."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    destination = Destination(repo_id, private, revision, pr, tag)
    recorded = folder / REFERENCE_FILE
    before = recorded.exists()
    readme = render_card(card, repo_id, ROOT) if card else _read(folder / "README.md")
    # The folder's own card is not sent where another is given.
    problems = [*problems_of(folder), *problems_of_card(readme), *(problems_of_text(str(card), readme) if card else ())]
    if not problems:
        reference = read_reference(recorded) if before else reference_of(folder)
        problems = check_scores(folder, reference)
    for problem in problems:
        print(f"upload: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(1)
    files = {**files_of(folder), "README.md": readme.encode()}
    files.setdefault(REFERENCE_FILE, json.dumps(reference, ensure_ascii=False, indent=2).encode())
    show_plan(files, destination, before)
    if not dry_run:
        commit = publish(files, destination, message, echo=typer.echo)
        typer.echo(str(commit.commit_url))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def show_plan(files: Files, destination: Destination, recorded: bool) -> None:
    """Print what will be sent, and where."""
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, content in sorted(files.items()):
        table.add_row(name, f"{len(content) if isinstance(content, bytes) else content.stat().st_size:,}")
    console = Console()
    console.print(table)
    how = "a pull request to" if destination.pr else "a commit to"
    console.print(f"As {how} {destination.repo_id}@{destination.revision}", end="")
    console.print(f", tagged {destination.tag}." if destination.tag else ".")
    console.print(
        "AutoModel and CrossEncoder give the scores that were recorded" + (" before." if recorded else " now.")
    )


def run(argv: list[str] | None = None) -> None:
    """Run the command line: errors are one line on standard error, and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    try:
        app(args=argv)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"upload: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
