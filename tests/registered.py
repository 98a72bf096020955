"""Run by test_registration.py in a fresh process: registered.py FOLDER STATEMENT... loads a folder after statements.

Prints JSON: what the auto classes load without remote code, and how many of our finders are left.
"""

import json
import sys


def main(folder, *statements):
    scope = {}
    for statement in statements:
        exec(statement, scope)

    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder)
    models = [auto.from_pretrained(folder) for auto in (AutoModel, AutoModelForSequenceClassification)]
    classes = [f"{type(each).__module__}.{type(each).__name__}" for each in (config, *models)]
    finders = [finder for finder in sys.meta_path if type(finder).__module__.startswith("modeling_querit")]
    print(json.dumps({"classes": classes, "finders": len(finders)}))


main(*sys.argv[1:])
