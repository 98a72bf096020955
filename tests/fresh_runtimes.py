"""Run by test_runtimes.py in a process of its own: scores of a saved folder in other packages, without ours."""

import json
import logging
import sys
from pathlib import Path

# As on a machine where the package was never installed.
sys.modules["modeling_querit"] = None


def tokenizers(folder, query, documents):
    """Scores by the tokenizer's pairs, in every way to give them."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    for name, auto_class in [("AutoTokenizer", AutoTokenizer), ("AutoProcessor", AutoProcessor)]:
        tokenizer = auto_class.from_pretrained(folder, trust_remote_code=True)
        for side in ("left", "right"):
            batch = tokenizer(
                [(query, document) for document in documents],
                truncation=True,
                padding=True,
                padding_side=side,
                return_tensors="pt",
            )
            with torch.inference_mode():
                yield f"{name}, {side}", model(**batch).logits.squeeze(-1).tanh().tolist()


def pipeline(folder, query, documents):
    from transformers import pipeline

    scorer = pipeline("text-classification", folder, trust_remote_code=True)
    results = scorer([{"text": query, "text_pair": document} for document in documents], batch_size=4)
    yield "pipeline", [result["score"] for result in results]


def rerankers(folder, query, documents):
    import torch
    from rerankers import Reranker

    trust = {"trust_remote_code": True}
    ranker = Reranker(
        folder, model_type="cross-encoder", dtype=torch.float32, verbose=0, model_kwargs=trust, tokenizer_kwargs=trust
    )
    results = sorted(ranker.rank(query, documents).results, key=lambda result: result.document.doc_id)
    yield "rerankers", torch.tensor([result.score for result in results]).tanh().tolist()


def txtai(folder, query, documents):
    import torch
    from txtai.pipeline import CrossEncoder

    scores = dict(CrossEncoder(folder, gpu=False, trust_remote_code=True)(query, documents, multilabel=None))
    yield "txtai", torch.tensor([scores[index] for index in range(len(documents))]).tanh().tolist()


def llama_index(folder, query, documents):
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [
        NodeWithScore(node=TextNode(text=document, id_=str(index)), score=0.0)
        for index, document in enumerate(documents)
    ]
    rerank = SentenceTransformerRerank(model=folder, top_n=len(nodes), device="cpu", trust_remote_code=True)
    scores = {node.node_id: node.score for node in rerank.postprocess_nodes(nodes, query_str=query)}
    yield "LlamaIndex", [float(scores[str(index)]) for index in range(len(documents))]


def haystack(folder, query, documents):
    import torch
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker

    for scale_score in (False, True):
        ranker = SentenceTransformersSimilarityRanker(
            model=folder,
            device=ComponentDevice.from_str("cpu"),
            top_k=len(documents),
            trust_remote_code=True,
            scale_score=scale_score,
        )
        ranker.warm_up()
        texts = [Document(id=str(index), content=document) for index, document in enumerate(documents)]
        scores = {document.id: document.score for document in ranker.run(query=query, documents=texts)["documents"]}
        logits = torch.tensor([float(scores[str(index)]) for index in range(len(documents))])
        # Scaled, it is the sigmoid of the logit.
        yield f"Haystack, {scale_score}", (torch.logit(logits) if scale_score else logits).tanh().tolist()


def main(inputs):
    scores = {}
    for runtime in (tokenizers, pipeline, rerankers, txtai, llama_index, haystack):
        scores |= dict(runtime(inputs["folder"], inputs["query"], inputs["documents"]))
    return scores


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    inputs = json.loads(Path(sys.argv[1]).read_text())
    Path(inputs["result"]).write_text(json.dumps(main(inputs)))
