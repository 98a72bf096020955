"""Skipped tests: `make test` installs everything, so a skip is an error unless its reason is listed here."""

import re

import pytest

# Why a test may be skipped even where all extras are installed: a pattern of the reason -> when it applies.
ALLOWED_SKIPS = {
    r"QUERIT_VLLM is not set to a Python that has vLLM": "vLLM needs an environment of its own",
    r"the experts of \w+ do not go through the registry in this version of transformers": "older transformers",
    r"could not import 'transformers\.models\.": "older transformers lacks the architecture",
    r"could not import 'ray'": "Ray is larger than all other extras together, so it is not among them",
    r"other layouts are transformers' own there": "machines with a GPU",
    r"needs chromium and chromedriver": "machines without a browser",
    r"needs a device that is always full|only Linux has a disk that is always full": "systems without /dev/full",
}


class UnexpectedSkips:
    """Fails a run in which a test was skipped for a reason that is not in `ALLOWED_SKIPS`."""

    def __init__(self):
        self.lines = []

    def pytest_runtest_logreport(self, report):
        self._check(report)

    def pytest_collectreport(self, report):
        self._check(report)

    def _check(self, report):
        # An expected failure is reported as skipped too, with its reason elsewhere.
        if report.skipped and not hasattr(report, "wasxfail"):
            _, _, reason = report.longrepr
            if not any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS):
                self.lines.append(f"{report.nodeid}: {reason}")

    def pytest_terminal_summary(self, terminalreporter):
        if self.lines:
            terminalreporter.section("skips that are not on the list (ALLOWED_SKIPS in tests/skips.py)", red=True)
            for line in self.lines:
                terminalreporter.line(line)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.lines and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
