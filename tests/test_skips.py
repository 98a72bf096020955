from types import SimpleNamespace

import pytest
from skips import UnexpectedSkips


def skipped(reason, **more):
    return SimpleNamespace(nodeid="test_x.py::test_x", skipped=True, longrepr=("test_x.py", 1, reason), **more)


def finish(*reports):
    plugin, session = UnexpectedSkips(), SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    for report in reports:
        plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish(session)
    return session.exitstatus


def test_a_skip_for_an_unknown_reason_fails_the_run():
    assert finish(skipped("Skipped: could not import 'bm25s'")) == pytest.ExitCode.TESTS_FAILED


def test_a_skip_for_a_listed_reason_and_an_expected_failure_do_not():
    reports = [skipped("Skipped: QUERIT_VLLM is not set to a Python that has vLLM"), skipped("", wasxfail="reason")]
    assert finish(*reports) == pytest.ExitCode.OK


def test_a_module_that_is_skipped_as_a_whole_fails_the_run():
    plugin, session = UnexpectedSkips(), SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    plugin.pytest_collectreport(skipped("Skipped: could not import 'peft'"))
    plugin.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
