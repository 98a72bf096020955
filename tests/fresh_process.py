"""Run by test_saving_querit.py in a process of its own: a saved folder in every runtime, without the package."""

import json
import sys
from pathlib import Path

# As on a machine where the package was never installed.
sys.modules["modeling_querit"] = None


def main(inputs):
    import torch
    from sentence_transformers import CrossEncoder
    from torch.utils.data import DataLoader
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    folder, query, documents = inputs["folder"], inputs["query"], inputs["documents"]
    pairs = [(query, document) for document in documents]
    results = {}

    try:
        import modeling_querit  # noqa: F401
    except ImportError:
        results["import_error"] = True

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    results["model"] = [f"{type(model).__module__}.{type(model).__name__}", model.training]
    results["backbone"] = type(model.model).__name__
    results["predict"] = model.predict(pairs).tolist()
    results["rank"] = [ranked.index for ranked in model.rank(query, documents, top_k=3)]
    batch = model.processor([query] * len(documents), documents)
    with torch.inference_mode():
        results["forward"] = model(**batch).score.squeeze(-1).tolist()

    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    results["classifier"] = type(classifier).__name__
    with torch.inference_mode():
        results["logits"] = classifier(**batch).logits.tolist()

    encoder = CrossEncoder(folder, trust_remote_code=True, device="cpu")
    results["encoder_activation"] = type(encoder.activation_fn).__name__
    results["encoder"] = encoder.predict(pairs).tolist()
    results["encoder_one"] = float(encoder.predict(pairs[0]))
    results["encoder_rank"] = [
        [ranked["corpus_id"], float(ranked["score"])]
        for ranked in encoder.rank(query, documents, show_progress_bar=False)
    ]
    results["encoder_instruction"] = encoder.predict(pairs, prompt=inputs["instruction"]).tolist()
    results["encoder_long"] = encoder.predict([(query, inputs["long"]), *pairs[:1]]).tolist()
    results["predict_instruction"] = model.predict(pairs, instruction=inputs["instruction"]).tolist()
    results["predict_long"] = model.predict([(query, inputs["long"]), *pairs[:1]]).tolist()

    again = Path(inputs["again"])
    model.save_pretrained(again / "ranker")
    classifier.save_pretrained(again / "classifier")
    encoder.save_pretrained(str(again / "encoder"))
    for name in ["ranker", "classifier", "encoder"]:
        loaded = AutoModel.from_pretrained(again / name, trust_remote_code=True)
        results[f"again_{name}"] = loaded.predict(pairs).tolist()
    results["again_cross_encoder"] = (
        CrossEncoder(str(again / "ranker"), trust_remote_code=True, device="cpu").predict(pairs).tolist()
    )

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    results["chat"] = tokenizer.apply_chat_template(
        [{"role": "query", "content": query}, {"role": "document", "content": documents[0]}], return_dict=True
    )["input_ids"]

    if inputs["mteb"]:
        from datasets import Dataset
        from mteb.models.model_implementations.querit_models import QueritWrapper

        wrapper = QueritWrapper(folder, batch_size=4)

        def loader(**columns):
            return DataLoader(Dataset.from_dict(columns), batch_size=3)

        arguments = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
        queries = [query] * len(documents)
        results["mteb"] = wrapper.predict(loader(text=queries), loader(text=documents), **arguments)
        instructions = [inputs["instruction"]] * len(documents)
        results["mteb_instruction"] = wrapper.predict(
            loader(text=queries, instruction=instructions),
            loader(text=documents, instruction=instructions),
            **arguments,
        )
    return results


if __name__ == "__main__":
    inputs = json.loads(Path(sys.argv[1]).read_text())
    Path(inputs["result"]).write_text(json.dumps(main(inputs)))
