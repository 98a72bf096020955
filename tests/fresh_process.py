"""Run by test_folder_querit.py in a process of its own: a saved folder in every runtime, without the package."""

import json
import sys
from pathlib import Path

# As on a machine where the package was never installed.
sys.modules["modeling_querit"] = None


def main(given):
    import torch
    from sentence_transformers import CrossEncoder
    from torch.utils.data import DataLoader
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    folder, query, documents = given["folder"], given["query"], given["documents"]
    pairs = [(query, document) for document in documents]
    found = {}

    try:
        import modeling_querit  # noqa: F401
    except ImportError:
        found["import_error"] = True

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    found["model"] = [f"{type(model).__module__}.{type(model).__name__}", model.training]
    found["backbone"] = type(model.model).__name__
    found["predict"] = model.predict(pairs).tolist()
    found["rank"] = [each.index for each in model.rank(query, documents, top_k=3)]
    batch = model.processor([query] * len(documents), documents)
    with torch.inference_mode():
        found["forward"] = model(**batch).score.squeeze(-1).tolist()

    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    found["classifier"] = type(classifier).__name__
    with torch.inference_mode():
        found["logits"] = classifier(**batch).logits.tolist()

    encoder = CrossEncoder(folder, trust_remote_code=True, device="cpu")
    found["encoder_activation"] = type(encoder.activation_fn).__name__
    found["encoder"] = encoder.predict(pairs).tolist()
    found["encoder_one"] = float(encoder.predict(pairs[0]))
    found["encoder_rank"] = [
        [each["corpus_id"], float(each["score"])] for each in encoder.rank(query, documents, show_progress_bar=False)
    ]
    found["encoder_instruction"] = encoder.predict(pairs, prompt=given["instruction"]).tolist()
    found["encoder_long"] = encoder.predict([(query, given["long"]), *pairs[:1]]).tolist()
    found["predict_instruction"] = model.predict(pairs, instruction=given["instruction"]).tolist()
    found["predict_long"] = model.predict([(query, given["long"]), *pairs[:1]]).tolist()

    again = Path(given["again"])
    model.save_pretrained(again / "ranker")
    classifier.save_pretrained(again / "classifier")
    encoder.save_pretrained(str(again / "encoder"))
    for name in ["ranker", "classifier", "encoder"]:
        loaded = AutoModel.from_pretrained(again / name, trust_remote_code=True)
        found[f"again_{name}"] = loaded.predict(pairs).tolist()
    found["again_cross_encoder"] = (
        CrossEncoder(str(again / "ranker"), trust_remote_code=True, device="cpu").predict(pairs).tolist()
    )

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found["chat"] = tokenizer.apply_chat_template(
        [{"role": "query", "content": query}, {"role": "document", "content": documents[0]}], return_dict=True
    )["input_ids"]

    if given["mteb"]:
        from datasets import Dataset
        from mteb.models.model_implementations.querit_models import QueritWrapper

        wrapper = QueritWrapper(folder, batch_size=4)

        def loader(**columns):
            return DataLoader(Dataset.from_dict(columns), batch_size=3)

        arguments = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
        queries = [query] * len(documents)
        found["mteb"] = wrapper.predict(loader(text=queries), loader(text=documents), **arguments)
        instructions = [given["instruction"]] * len(documents)
        found["mteb_instruction"] = wrapper.predict(
            loader(text=queries, instruction=instructions),
            loader(text=documents, instruction=instructions),
            **arguments,
        )
    return found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["result"]).write_text(json.dumps(main(given)))
