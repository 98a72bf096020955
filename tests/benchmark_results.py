"""What every benchmark writes with `--json`."""

import json

MACHINE = {"cpu", "cores", "threads", "capabilities", "torch", "transformers", "seed"}


def check_results(path):
    results = json.loads(path.read_text())
    assert results["machine"].keys() >= MACHINE
    assert results["machine"]["capabilities"].keys() == {"amx", "avx512_bf16"}
    for row in results["rows"]:
        assert row.keys() >= {"workload", "ours", "against", "seconds_ours", "all_seconds_ours"}
        assert ("ratio" in row) != ("fraction_of_bound" in row)
        assert row.get("ratio", row.get("fraction_of_bound")) > 0
    return results
