"""The tree: tests mirror the package, packages import what docs/architecture.md allows, and what ships is listed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_querit"
TESTS = ROOT / "tests"
# Tests of what is not a module of the package.
BESIDE_THE_PACKAGE = {
    *("docs", "forked_python", "hub_server", "metric_module", "private_names", "recipes", "runtimes", "skips", "tree"),
}
# Modules without behaviour of their own, or whose behaviour is that of those that use them.
WITHOUT_TESTS = {"release/fresh_process"}


def module_names():
    """Modules of the package and of the benchmarks, such as `training/losses`."""
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    return modules | {f"benchmarks/{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")}


def files_of_tests():
    return sorted(path for path in TESTS.rglob("test_*.py") if "fixtures" not in path.parts)


def module_of(path, modules):
    """The module a test file is about: `test_MODULE.py` or `test_MODULE_ASPECT.py` in the folder of its package."""
    package = path.parent.relative_to(TESTS).as_posix()
    name = path.stem.removeprefix("test_")
    if package == "." and name in BESIDE_THE_PACKAGE:
        return name
    while name:
        module = name if package == "." else f"{package}/{name}"
        if module in modules:
            return module
        name = name.rpartition("_")[0]
    return None


def test_every_test_file_is_named_after_a_module():
    modules = module_names()
    strays = [str(path.relative_to(ROOT)) for path in files_of_tests() if module_of(path, modules) is None]
    assert not strays, f"name these tests/PACKAGE/test_MODULE[_ASPECT].py after a module that exists: {strays}"


def test_every_module_with_behaviour_has_a_test_file():
    modules = module_names()
    tested = {module_of(path, modules) for path in files_of_tests()}
    untested = {
        module
        for module in modules - tested - WITHOUT_TESTS
        if module.rpartition("/")[2] not in ("__init__", "__main__") and not module.startswith("benchmarks/")
    }
    assert not untested, f"these modules have no tests/PACKAGE/test_MODULE.py: {sorted(untested)}"


def test_exceptions_are_not_left_behind():
    assert module_names() >= WITHOUT_TESTS
    assert {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")} >= BESIDE_THE_PACKAGE


def package_of(parts):
    """`training` for `training.losses`; `core` for files that travel with a checkpoint; else `top level`."""
    if len(parts) > 1 or (PACKAGE / parts[0]).is_dir():
        return parts[0]
    return "core" if parts[0].endswith("_querit") else "top level"


def imports_between_packages():
    """(package, imported package) -> files with such an import, at any depth of a function."""
    edges = {}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts
        # The command line and the package's entry points put everything together.
        if here in {("__init__",), ("__main__",), ("cli",)}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = here[: len(here) - node.level]
                names = [node.module] if node.module else [name.name for name in node.names]
                for name in names:
                    target = (*base, *name.split("."))
                    if package_of(here) != package_of(target):
                        edges.setdefault((package_of(here), package_of(target)), set()).add(path.name)
    return edges


def allowed_imports():
    """The table "What each package may import" of docs/architecture.md: package -> packages it may import."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = re.search(r"\| package \| .*?\n((?:\|.*\n)+)", text)[1]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()[1:]]
    return {row[0].strip("`/"): {cell.strip(" `/") for cell in row[-1].split(",")} - {"", "nothing"} for row in rows}


def test_packages_import_only_what_the_architecture_page_allows():
    allowed = allowed_imports()
    forbidden = {
        f"{package} imports {target} in {', '.join(sorted(files))}"
        for (package, target), files in imports_between_packages().items()
        if target not in allowed[package]
    }
    assert not forbidden, f"{sorted(forbidden)}: docs/architecture.md does not allow it"


def test_the_architecture_page_allows_nothing_that_is_not_used():
    used = {}
    for package, target in imports_between_packages():
        used.setdefault(package, set()).add(target)
    allowed = allowed_imports()
    assert allowed.keys() == {package_of(module.split("/")) for module in module_names() if "benchmarks" not in module}
    unused = {package: packages - used.get(package, set()) for package, packages in allowed.items()}
    assert {package: packages for package, packages in unused.items() if packages} == {}


def test_imports_between_packages_run_one_way():
    order = list(allowed_imports())
    upwards = {edge for edge in imports_between_packages() if order.index(edge[1]) >= order.index(edge[0])}
    assert not upwards, "docs/architecture.md: a package may import only those listed above it"


def test_the_version_stands_in_one_place():
    import modeling_querit

    command = [sys.executable, "setup.py", "--version"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == modeling_querit.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert modeling_querit.__version__.partition(".dev")[0] in changelog or "[Unreleased]" in changelog


@pytest.mark.slow
def test_files_beside_the_code_are_packaged(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("py.typed", "checkpoints/mini/adapter_config.json", "serving/page_files/index.html"):
        assert (tmp_path / "lib" / "modeling_querit" / name).is_file()
