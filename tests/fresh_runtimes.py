"""Run by test_runtimes.py in a process of its own: scores of saved folders in other packages, without ours."""

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


def langchain(folder, query, documents):
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder

    encoder = HuggingFaceCrossEncoder(model_name=folder, model_kwargs={"trust_remote_code": True, "device": "cpu"})
    yield "LangChain", encoder.score([(query, document) for document in documents]).tolist()


def pyterrier(folder, query, documents):
    import pandas
    import pyterrier as pt
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, trust_remote_code=True, device="cpu")
    ranker = pt.apply.doc_score(
        lambda rows: model.predict(list(zip(rows["query"], rows["text"], strict=True))), batch_size=4
    )
    rows = [{"qid": "q", "query": query, "docno": str(index), "text": text} for index, text in enumerate(documents)]
    ranked = ranker(pandas.DataFrame(rows)).set_index("docno")["score"]
    yield "PyTerrier", [float(ranked[str(index)]) for index in range(len(documents))]


def onnx(folder, query, documents):
    import numpy
    import onnxruntime
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    # Of the implementations of experts, this is the one that ONNX has operators for.
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, experts_implementation="batched_mm"
    )
    batch = dict(tokenizer([query] * 2, documents[:2], padding=True, return_tensors="pt"))
    path = str(Path(folder).with_suffix(".onnx"))
    torch.onnx.export(
        model.eval(),
        kwargs=batch,
        f=path,
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in batch},
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    batch = tokenizer([query] * len(documents), documents, padding=True, return_tensors="np")
    yield "ONNX", numpy.tanh(session.run(["logits"], dict(batch))[0].squeeze(-1)).tolist()


RUNTIMES = (tokenizers, pipeline, rerankers, txtai, langchain, llama_index, haystack, pyterrier, onnx)


def main(inputs):
    return {
        architecture: {
            name: scores
            for runtime in RUNTIMES
            for name, scores in runtime(folder, inputs["query"], inputs["documents"])
        }
        for architecture, folder in inputs["folders"].items()
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    inputs = json.loads(Path(sys.argv[1]).read_text())
    Path(inputs["result"]).write_text(json.dumps(main(inputs)))
