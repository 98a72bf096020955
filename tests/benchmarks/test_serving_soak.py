import json

import pytest

from benchmarks import serving_soak

FINE = {
    "outcomes": {"good: 200": 8, "bad: 4xx": 1, "cut off": 1},
    "largest_difference": 1e-7,
    "resident_mb": [700.0, 701.0, 702.0, 702.0, 702.0, 702.0],
    "sigterm": {"requests": 4, "answered": 4, "exit_code": 0},
    "sigkill": {"requests": 4, "answered": 4, "largest_difference": 1e-7},
}


def test_nothing_is_wrong_with_a_fine_run():
    assert serving_soak.problems_of(FINE, 10) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"outcomes": {"good: 200": 9}}, "requests were lost"),
        ({"outcomes": {"good: 200": 9, "good: 500": 1}}, "a request was answered by another status"),
        ({"largest_difference": float("nan")}, "scores differ from predict's"),
        ({"resident_mb": [700.0, 701.0, 740.0, 780.0, 800.0, 820.0]}, "memory grew"),
        ({"sigterm": {"requests": 4, "answered": 3, "exit_code": 0}}, "SIGTERM lost requests"),
        ({"sigterm": {"requests": 4, "answered": 4, "exit_code": -15}}, "SIGTERM did not end the process in order"),
        ({"sigkill": {"requests": 4, "answered": 3, "largest_difference": 0.0}}, "SIGKILL lost requests"),
    ],
)
def test_what_is_wrong_is_named(change, problem):
    assert serving_soak.problems_of(FINE | change, 10) == [problem]


@pytest.mark.slow
def test_a_server_survives_its_clients(saved_folders, tmp_path):
    path = tmp_path / "soak.json"
    arguments = ["--model", str(saved_folders("qwen3")), "--requests", "50", "--documents", "20", "--connections", "6"]
    serving_soak.main([*arguments, "--json", str(path)])
    results = json.loads(path.read_text())
    assert results["outcomes"]["good: 200"] > 35
    assert results["sigterm"]["open"] > 0
    assert results["sigkill"]["retries"] > 0
