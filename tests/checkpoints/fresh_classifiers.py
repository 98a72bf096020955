"""Run by test_export.py in a process of its own: exported folders in other people's code alone, none of ours."""

import json
import sys
from pathlib import Path

# As on a machine where the package was never installed.
sys.modules["modeling_querit"] = None


def main(given):
    found = {name: scores_of(folder, given) for name, folder in given["folders"].items()}
    found["remote_code"] = sorted(name for name in sys.modules if name.startswith("transformers_modules"))
    return found


def scores_of(folder, given):
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = {}
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    found["class"] = [type(model).__module__.split(".")[0], type(model).__name__]
    found["labels"] = model.config.num_labels
    found["dtype"] = str(model.dtype)
    found["missing"] = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    found["unexpected"] = sorted(info["unexpected_keys"])

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logits_of(conversations):
        batch = tokenizer.apply_chat_template(conversations, padding=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**batch).logits.float()
        assert logits.shape == (len(conversations), 1)
        return logits.squeeze(-1).tolist()

    conversations = given["conversations"]
    found["logits"] = logits_of(conversations)
    found["alone"] = [logits_of([each])[0] for each in conversations]
    tokenizer.padding_side = "right"
    found["right"] = logits_of(conversations)

    encoder = CrossEncoder(folder, device="cpu")
    query, documents = given["query"], given["documents"]
    pairs = [(query, document) for document in documents]
    found["activation"] = type(encoder.activation_fn).__name__
    found["encoder"] = encoder.predict(pairs).tolist()
    found["encoder_twos"] = encoder.predict(pairs, batch_size=2).tolist()
    found["encoder_instruction"] = encoder.predict(pairs, prompt=given["instruction"]).tolist()
    found["encoder_long"] = encoder.predict([(query, given["long"]), *pairs[:1]]).tolist()
    found["encoder_rank"] = [each["corpus_id"] for each in encoder.rank(query, documents, show_progress_bar=False)]
    return found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["result"]).write_text(json.dumps(main(given)))
