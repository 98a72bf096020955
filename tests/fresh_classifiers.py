"""A program for a fresh process: converted classifiers in transformers and sentence-transformers, without this package.

Run by tests/checkpoints/test_convert_seq_cls.py.
"""

import json
import sys
from pathlib import Path

# As if the package was not installed.
sys.modules["modeling_querit"] = None


def main(request):
    results = {name: run(folder, request) for name, folder in request["folders"].items()}
    results["remote_code"] = sorted(name for name in sys.modules if name.startswith("transformers_modules"))
    return results


def run(folder, request):
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    results = {}
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    results["class"] = [type(model).__module__.split(".")[0], type(model).__name__]
    results["labels"] = model.config.num_labels
    results["dtype"] = str(model.dtype)
    results["missing"] = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    results["unexpected"] = sorted(info["unexpected_keys"])

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logits_of(conversations):
        batch = tokenizer.apply_chat_template(conversations, padding=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**batch).logits.float()
        assert logits.shape == (len(conversations), 1)
        return logits.squeeze(-1).tolist()

    conversations = request["conversations"]
    results["logits"] = logits_of(conversations)
    results["alone"] = [logits_of([conversation])[0] for conversation in conversations]
    tokenizer.padding_side = "right"
    results["right"] = logits_of(conversations)

    encoder = CrossEncoder(folder, device="cpu")
    query, documents = request["query"], request["documents"]
    pairs = [(query, document) for document in documents]
    results["activation"] = type(encoder.activation_fn).__name__
    results["encoder"] = encoder.predict(pairs).tolist()
    results["encoder_twos"] = encoder.predict(pairs, batch_size=2).tolist()
    results["encoder_instruction"] = encoder.predict(pairs, prompt=request["instruction"]).tolist()
    results["encoder_long"] = encoder.predict([(query, request["long"]), *pairs[:1]]).tolist()
    results["encoder_rank"] = [
        ranked["corpus_id"] for ranked in encoder.rank(query, documents, show_progress_bar=False)
    ]
    return results


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(request["result"]).write_text(json.dumps(main(request)))
