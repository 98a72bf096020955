"""Options of the suite, and what of it runs where: no network, one thread; the fixtures are in suite_fixtures.py."""

import contextlib
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from pathlib import Path

import pytest
from forked_python import forked_python
from skips import UnexpectedSkips


def pytest_addoption(parser):
    parser.addoption(
        "--fail-on-skip", action="store_true", help="Fail if a test is skipped for a reason that is not on the list."
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: some tests wait for servers and processes."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    # Under pytest-xdist only the process that collects the reports may judge them.
    if config.getoption("--fail-on-skip") and not is_worker:
        config.pluginmanager.register(UnexpectedSkips(), "unexpected-skips")
    if not is_worker and config.getoption("numprocesses", None):
        # This process hands out tests: it needs no models. All workers share a server of `forked_python`.
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["QUERIT_FORKED_PYTHON"] = stack.enter_context(forked_python(folder))
    else:
        config.pluginmanager.import_plugin("suite_fixtures")


def pytest_collection_finish():
    # Each training run collects garbage several times: modules and tests are none.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    # What is tested on both architectures is tested on one in the fast lane: on the one that also has experts.
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("architecture") == "qwen3":
            item.add_marker(pytest.mark.slow)
