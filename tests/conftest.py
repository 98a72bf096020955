"""Options of the suite, and what of it runs where: no network, one thread; the fixtures are in suite_fixtures.py."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from skips import UnexpectedSkips


def pytest_addoption(parser):
    parser.addoption(
        "--fail-on-skip", action="store_true", help="Fail if a test is skipped for a reason that is not on the list."
    )


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    # Under pytest-xdist only the process that collects the reports may judge them.
    if config.getoption("--fail-on-skip") and not is_worker:
        config.pluginmanager.register(UnexpectedSkips(), "unexpected-skips")
    # That process runs no tests, and so needs no models.
    if is_worker or not config.getoption("numprocesses", None):
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
