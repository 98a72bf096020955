import json
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

CLASSES = [
    "modeling_querit.configuration_querit.QueritConfig",
    "modeling_querit.modeling_querit.QueritForSequenceRanking",
    "modeling_querit.modeling_querit.QueritForSequenceClassification",
]


@pytest.fixture
def load_after(saved_folders, forked_python):
    """What the auto classes load in a fresh process, after some statements."""
    return partial(load_in_process, forked_python, saved_folders("qwen3"))


def load_in_process(python, folder, *statements):
    script = Path(__file__).with_name("registered.py")
    command = [python, str(script), str(folder), *statements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "statements",
    [
        ["import modeling_querit"],
        ["import modeling_querit", "import transformers.modeling_utils"],
        ["import transformers", "import modeling_querit"],
        ["from transformers import AutoModel", "import modeling_querit"],
        ["from modeling_querit import QueritForSequenceRanking"],
    ],
    ids="; ".join,
)
def test_auto_classes_know_our_folders(load_after, statements):
    loaded = load_after(*statements)
    assert loaded["classes"] == CLASSES
    # It has done its work.
    assert loaded["finders"] == 0


def test_public_names_are_listed_and_lazy():
    import modeling_querit

    assert sorted(modeling_querit.__all__) == sorted(modeling_querit._MODULES)
    assert {*modeling_querit.__all__, "__version__"} <= set(dir(modeling_querit))
    for name in modeling_querit.__all__:
        assert getattr(modeling_querit, name).__name__ == name
    assert modeling_querit.__version__ == version("modeling-querit")
    with pytest.raises(AttributeError, match="module 'modeling_querit' has no attribute 'QueritModel'"):
        modeling_querit.QueritModel  # noqa: B018


def test_the_package_is_imported_without_torch_and_transformers():
    statements = "import sys, modeling_querit; dir(modeling_querit); modeling_querit.__version__"
    imported = "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    command = [sys.executable, "-c", f"{statements}; {imported}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_models_can_be_loaded_from_several_threads(load_after):
    threads = (
        "from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "def load(number):\n"
        "    from transformers import AutoConfig, AutoModel\n"
        "    return AutoModel.from_pretrained(sys.argv[1])\n"
        "models = list(Pool(4).map(load, range(4)))\n"
    )
    loaded = load_after("import sys, modeling_querit, transformers", threads)
    assert loaded["classes"] == CLASSES
