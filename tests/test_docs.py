"""README.md and docs/: every code block runs, on a tiny model in the place of the default one, or says why not.

Comments before a block, which readers of the page do not see:

`<!-- not run: REASON -->`  the block is only checked (YAML against the settings, Python for its syntax)
`<!-- file: NAME -->`       the block is the content of a file that later blocks of the page read
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import cached_assets_path

from modeling_querit import default_model_path
from modeling_querit.checkpoints import mini
from modeling_querit.training import losses

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
REASONS = {
    "needs the Hub",
    "needs a GPU",
    "needs a server",
    "needs a model of yours",
    "needs documents of yours",
    "takes minutes",
    "sets up an environment",
}
# What is shown, not done.
NO_CODE = {"text", "mermaid", "bibtex"}
# Pages that train take longer.
SLOW = {"adapt.md", "evaluate.md", "evaluator.md", "merge.md", "mteb.md", "release.md", "rerank.md", "train.md"}
_COMMENT = re.compile(r"<!-- (not run|file): (.+?) -->")


@dataclass
class Block:
    page: Path
    line: int
    language: str
    code: str
    comments: dict[str, str] = field(default_factory=dict)

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}, line {self.line}"

    @property
    def commands(self):
        """Lines of a shell block, with what a backslash continues joined, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_blocks(page):
    blocks, comments, block = [], {}, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        is_fence = line.lstrip().startswith("```")
        if block is not None and is_fence:
            blocks.append(block)
            block, comments = None, {}
        elif block is not None:
            block.code += line + "\n"
        elif is_fence:
            block = Block(page, number, line.strip().removeprefix("```"), "", comments)
        elif found := _COMMENT.findall(line):
            comments |= dict(found)
        elif line.strip():
            comments = {}
    assert block is None, f"{block} is not closed"
    return blocks


def name_of(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.fixture
def clone(tmp_path, monkeypatch, saved_folders, forked_python):
    """A place to work in that looks like a clone, where `mini` is a tiny model."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "build"):
            (tmp_path / path.name).symlink_to(path)
    assets = tmp_path / ".assets"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mini, "cached_assets_path", partial(cached_assets_path, assets_dir=assets))
    monkeypatch.setattr(mini, "_assemble", lambda folder: shutil.copytree(saved_folders("qwen3"), folder))
    # Also for commands that run in a process of their own.
    monkeypatch.setenv("HF_ASSETS_CACHE", str(assets))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    scripts = tmp_path / ".scripts"
    scripts.mkdir()
    for name, command in (("querit", f"{forked_python} -m modeling_querit"), ("python", forked_python)):
        (scripts / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (scripts / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", forked_python)
    monkeypatch.setenv("PATH", os.pathsep.join([str(scripts), os.environ["PATH"]]))
    # A block that adds a loss adds it to a copy.
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    default_model_path()
    return tmp_path


def run_shell(block, querit):
    """`querit` runs in this process, which has imported everything; whatever else is in the block makes it a script."""
    commands = [shlex.split(line, comments=True) for line in block.commands]
    is_plain = not any(re.search(r"[|<>$;&]", line.partition(" #")[0]) for line in block.commands)
    if is_plain and all(command[0] == "querit" for command in commands):
        for command in commands:
            code, out, err = querit(*command[1:])
            assert code == 0, f"{block}: {shlex.join(command)}\n{out}{err}"
        return
    script = "set -euo pipefail\n" + "\n".join(block.commands)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block}:\n{done.stdout}{done.stderr}"


def run_python(block, namespace):
    """All blocks of a page share their names, as in a notebook."""
    # Line numbers of a traceback are those of the page.
    code = "\n" * block.line + block.code
    exec(compile(code, str(block.page), "exec"), namespace)


def check_settings(block, folder):
    """Settings of `querit train` and `querit adapt` have names that exist and values that are allowed."""
    from modeling_querit.adaptation.settings import AdaptSettings
    from modeling_querit.training.arguments import settings_from_mapping

    values = yaml.safe_load(block.code)
    if "corpus" in values:
        AdaptSettings.model_validate(values)
    else:
        settings_from_mapping({"output_dir": str(folder)} | values, str(block))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW), id=name_of(page)) for page in PAGES]
)
def test_code_blocks_run(page, clone, querit):
    namespace = {"__name__": "__main__"}
    for block in read_blocks(page):
        if name := block.comments.get("file"):
            (clone / name).write_text(block.code, encoding="utf-8")
        if block.language == "yaml":
            check_settings(block, clone / "out")
        elif block.language == "python" and "not run" not in block.comments:
            run_python(block, namespace)
        elif block.language == "bash" and "not run" not in block.comments:
            run_shell(block, querit)


@each_page
def test_code_blocks_that_do_not_run_say_why(page):
    for block in read_blocks(page):
        assert block.language, f"{block} has no language: name one, or `text` for what is not code"
        if block.language not in {"python", "bash", "yaml", "jsonl", "json", *NO_CODE}:
            pytest.fail(f"{block}: nobody knows how to run {block.language}")
        if block.language in ("json", "jsonl"):
            assert "file" in block.comments, f"{block}: say which file this is"
        reason = block.comments.get("not run")
        assert reason is None or reason in REASONS, f"{block}: {reason!r} is not among {sorted(REASONS)}"
        if block.language == "python":
            ast.parse(block.code)


@each_page
def test_make_targets_and_extras_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    setup = (ROOT / "setup.py").read_text()
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{page.name}: make {target}"
    for extras in re.findall(r"modeling-querit\[([a-z0-9,-]+)\]", text):
        for extra in extras.split(","):
            assert f'"{extra}"' in setup, f"{page.name}: the extra {extra}"


def anchor_of(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{page.name}: {target}"


@each_page
def test_modules_and_files_that_a_page_names_exist(page):
    """Names in backquotes: paths of the tree and dotted names of the package."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path in re.findall(r"`((?:modeling_querit|tests|examples|hub_cards|benchmarks|docs|results)/[\w./-]*)`", text):
        assert (ROOT / path).exists() or re.search(r"[A-Z]{3}", path), f"{page.name}: {path}"
    for module in re.findall(r"`((?:modeling_querit|benchmarks)(?:\.\w+)+)`", text):
        path = ROOT / module.replace(".", "/")
        candidates = (path, path.with_suffix(".py"), path.parent, path.parent.with_suffix(".py"))
        assert any(candidate.exists() for candidate in candidates), f"{page.name}: {module}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_command_has_a_page_that_names_all_its_options():
    from typer.main import get_command

    from modeling_querit.cli import app

    for name, command in get_command(app).commands.items():
        page = ROOT / "docs" / f"{name}.md"
        assert page.exists(), f"querit {name} has no docs/{name}.md"
        text = page.read_text(encoding="utf-8")
        options = [max(option.opts, key=len) for option in command.params if option.opts[0].startswith("-")]
        missing = [option for option in options if option not in text and option != "--help"]
        assert not missing, f"docs/{name}.md does not mention {missing}"


def test_the_example_collection_holds_the_example_documents():
    from modeling_querit.files import read_jsonl

    names = ("linux_howto/corpus.jsonl", "linux_howto.jsonl")
    corpus, documents = (
        [(row["title"], row["text"]) for _, row in read_jsonl(ROOT / "examples" / name)] for name in names
    )
    assert corpus == documents


def test_examples_name_data_that_is_there_or_say_where_it_comes_from():
    for path in (ROOT / "examples").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources = [*settings.get("train", []), *settings.get("validation", [])] if "corpus" not in settings else []
        for source in sources:
            folder = source.partition(":")[0]
            assert (ROOT / folder).exists() or f"{folder.split('/')[0]}/" in _introduction(path), (
                f"{path.name}: {source}"
            )


def _introduction(path):
    return "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#"))


def test_the_pages_are_of_the_tiny_model_too(clone):
    """The stand-in is what commands load as `mini`: nothing here assembles the real one."""
    assert tiny.read_tensors(default_model_path())["score.weight"].shape == (2, 32)
