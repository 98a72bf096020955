"""Scores and timings of vLLM, run by the Python of an environment that has it: python vllm_peer.py REQUEST.json

The request has a Querit folder, a query, documents, a dtype, a number of rounds, and the path of the result. vLLM's own
sequence classification adapter serves the folder, with the head folded into one logit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def register(model_type: str) -> None:
    """Register the Querit classes with vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.adapters import as_seq_cls_model

    if model_type == "qwen3":
        from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM as Decoder
    else:
        from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM as Decoder

    class QueritForSequenceRanking(as_seq_cls_model(Decoder)):
        """The decoder with one logit, (z1 - z0) / 2, at the last token."""

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            config = vllm_config.model_config.hf_config.get_text_config()
            config.num_labels = 1
            config.architectures = [Decoder.__name__]
            narrowed = vllm_config.with_hf_config(config, architectures=config.architectures)
            super().__init__(vllm_config=narrowed, prefix=prefix)

        def load_weights(self, weights: Any) -> Any:
            """Fold the head's two rows into one."""
            heads = ("score.weight", "score.bias")
            return super().load_weights((name, (w[1:] - w[:1]) / 2 if name in heads else w) for name, w in weights)

    for name in ("QueritForSequenceRanking", "QueritForSequenceClassification"):
        ModelRegistry.register_model(name, QueritForSequenceRanking)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Score once to warm up, then once for each round."""
    import vllm

    folder = Path(request["folder"])
    register(json.loads((folder / "config.json").read_text())["text_config"]["model_type"])
    llm = vllm.LLM(
        model=str(folder), runner="pooling", max_model_len=4096, dtype=request["dtype"], trust_remote_code=True
    )
    template = (folder / "chat_template.jinja").read_text()
    seconds: list[float] = []
    for _ in range(request["rounds"] + 1):
        # Otherwise the pairs of the previous round are cached.
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.score(request["query"], request["documents"], chat_template=template, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return {
        "version": vllm.__version__,
        "seconds": seconds[1:],
        "pairs_per_second": len(request["documents"]) / min(seconds[1:]),
        "scores": [output.outputs.score for output in outputs],
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(request["result"]).write_text(json.dumps(main(request)))
