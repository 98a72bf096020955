"""Releasing a folder on the Hub: check it, fill in its card, publish it in one commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..cards import find_card, find_card_problems, render_card
from ..checkpoints.loading import check_folder
from ..console import print_table, printable, say
from ..files import read_text
from .checks import find_problems, find_text_problems, visible_files
from .hub import Destination, Files, publish
from .reference_scores import REFERENCE_FILE, compute_reference, find_score_problems, read_reference


def release_folder(
    folder: Path,
    destination: Destination,
    *,
    card: str | None = None,
    message: str = "Upload reranker",
    dry_run: bool = False,
    echo: Callable[[str], None] = print,
) -> list[str]:
    """Check a reranker's folder, and publish it if nothing is wrong.

    AutoModel and CrossEncoder load the folder in a fresh process that cannot import this package, and must give its
    reference scores. Then it is uploaded in one commit, downloaded again and compared. The folder is not changed:
    reference scores that it lacks are computed and uploaded with it.

    Args:
        folder: Reranker, as `save_pretrained` or `querit train`, `adapt`, `merge` or `convert` writes it.
        destination: Repository, branch and tag.
        card: Card, in place of the folder's README.md: a file, or the name of a template (see `find_card`).
        message: Message of the commit.
        dry_run: Whether to stop before the upload.
        echo: Function that prints a line.

    Returns:
        Problems of the folder and its card, one sentence each; the folder is published only if there are none.

    Raises:
        OSError: if there is no such folder or card.
        PermissionError, ValueError, ConnectionError: as in `publish`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    # What no command loads is refused by each of them in the same words.
    check_folder(folder)
    if card is None:
        readme = folder / "README.md"
        text = read_text(readme) if readme.is_file() else ""
        card_problems = find_card_problems(text)
    else:
        path = find_card(card)
        text = render_card(path, destination.repo_id)
        card_problems = [*find_card_problems(text, str(path)), *find_text_problems(str(path), text)]
    if problems := [*find_problems(folder), *card_problems]:
        return problems
    reference_file = folder / REFERENCE_FILE
    is_recorded = reference_file.exists()
    reference = read_reference(reference_file) if is_recorded else compute_reference(folder)
    if problems := find_score_problems(folder, reference):
        return problems
    files: dict[str, Path | bytes] = {**visible_files(folder), "README.md": text.encode()}
    files.setdefault(REFERENCE_FILE, json.dumps(reference, ensure_ascii=False, indent=2).encode())
    print_plan(files, destination, is_recorded)
    if not dry_run:
        echo(str(publish(files, destination, message, echo=echo).commit_url))
    return []


def print_plan(files: Files, destination: Destination, is_recorded: bool) -> None:
    """Print which files are published, and where.

    Args:
        files: Contents or paths of files, by their paths in the repository.
        destination: Repository, branch and tag.
        is_recorded: Whether the folder had reference scores before.
    """
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, content in sorted(files.items()):
        table.add_row(
            Text(printable(name)), f"{len(content) if isinstance(content, bytes) else content.stat().st_size:,}"
        )
    print_table(table)
    how = "a pull request to" if destination.pr else "a commit to"
    tag = f", tagged {destination.tag}" if destination.tag else ""
    say(f"As {how} {destination.repo_id}@{destination.revision}{tag}.")
    computed = "" if is_recorded else ", which are computed just now"
    say(f"AutoModel and CrossEncoder give the reference scores{computed}.")
