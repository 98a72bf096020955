"""Private names of other libraries that the package uses: few, each with its reason, and each still there."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import transformers

import modeling_querit

PACKAGE = Path(modeling_querit.__file__).parent

# Where a name lives -> why it is used. `()` makes an instance; a colon stands before what a module sets on objects.
PRIVATE_NAMES = {
    # transformers: the attention and experts of a config have no public getter.
    "transformers.PreTrainedConfig()._attn_implementation": "which attention a backbone computes",
    "transformers.PreTrainedConfig()._experts_implementation": "hand the choice of experts to the backbone",
    "transformers.PreTrainedConfig()._name_or_path": "a saved config shall not hold a path of this machine",
    "transformers.configuration_utils:_commit_hash": "load the tokenizer of the same commit as the weights",
    # transformers: what a model class says about itself.
    "transformers.PreTrainedModel._supports_sdpa": "our class has the attention of its backbone",
    "transformers.PreTrainedModel._supports_flash_attn": "our class has the attention of its backbone",
    "transformers.PreTrainedModel._supports_flex_attn": "our class has the attention of its backbone",
    "transformers.PreTrainedModel._supports_attention_backend": "whether attention can be computed within each pair",
    "transformers.PreTrainedModel._is_stateful": "recurrent backbones carry state over the ends of pairs",
    "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected": "published checkpoints hold an lm_head",
    "transformers.PreTrainedModel._can_set_experts_implementation": "experts lie in the backbone's file, not in ours",
    "transformers.PreTrainedModel._init_weights": "the head starts at zero",
    "transformers.utils.hub.PushToHubMixin._upload_modified_files": "push_to_hub uploads all files of a folder",
    # transformers: all calls of a tokenizer end there, with the meaning of padding and truncation resolved.
    "transformers.PreTrainedTokenizerFast._auto_class": "set by register_for_auto_class",
    "transformers.PreTrainedTokenizerFast._encode_plus": "pairs are the tokenizer's own business",
    # transformers: published keys are renamed on load, and saved under our own.
    "transformers.core_model_loading:_weight_conversions": "drop the renaming of published keys before a save",
    "transformers.core_model_loading:_original_source_patterns": "find the renaming of published keys",
    # transformers: our experts stand in for its own.
    "transformers.integrations.moe._default_apply_gate": "recognize the activation that our kernels compute",
    "transformers.integrations.moe:_apply_gate": "the activation of a layer of experts",
    "transformers.integrations.moe:_is_expert_parallel": "leave experts that are spread over devices to transformers",
    "transformers.modeling_flash_attention_utils._flash_attention_forward": "attention within each pair on a GPU",
    "transformers.Trainer._get_num_items_in_batch": "each loss is divided by items of its own, not by labels",
    "transformers.Trainer._get_train_sampler": "batches of similar length are drawn by the rows' lengths",
    "transformers.Trainer._load_best_model": "as _load_from_checkpoint, for the best checkpoint",
    "transformers.Trainer._load_from_checkpoint": "experts have keys of their own on disk, which the Trainer skips",
    "transformers.Trainer._run_epoch": "a run that was killed after its last step has no step left",
    "transformers.Trainer._prepare_inputs": "move a batch to the device as the Trainer does",
    # mteb
    "mteb._create_dataloaders": "texts of queries exactly as mteb gives them to a model",
    # accelerate
    "accelerate.hooks:_hf_hook": "where accelerate computes what it loads",
    # torch
    "torch._int_mm": "products of int8 matrices have no public function",
    "torch._C": "inference mode as a C++ object, which an interrupt cannot leave on",
    "torch._C._InferenceMode": "inference mode as a C++ object, which an interrupt cannot leave on",
    "torch.Tensor._version": "whether weights have changed since processes were given them",
    "torch.nn.Module()._modules": "submodules by name, also those that have two names",
}
# Public in spite of their underscore.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
# Set by this package on objects of classes from elsewhere.
OURS = {"_processor", "_LOCKS"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != ""


def last_of(entry):
    return entry.replace(":", ".").rpartition(".")[2]


def trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def defined_here():
    """Names that a def, class, assignment or argument of the package makes."""
    names = set(OURS)
    for _, tree in trees():
        for node in ast.walk(tree):
            match node:
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                    | ast.arg(arg=name)
                ):
                    names.add(name)
                case (
                    ast.Name(id=name, ctx=ast.Store())
                    | ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store())
                ):
                    names.add(name)
    return names


def names_in(node):
    """Names that an import, an attribute or a getattr asks for."""
    match node:
        case ast.ImportFrom(level=0, module=module, names=names):
            return [part for name in names for part in (*module.split("."), name.name)]
        case ast.Import(names=names):
            return [part for name in names for part in name.name.split(".")]
        case ast.Attribute(attr=name):
            return [name]
        case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
            return [name]
    return []


def names_used():
    """Private name -> files that use it."""
    used = {}
    for path, tree in trees():
        for name in (name for node in ast.walk(tree) for name in names_in(node)):
            if is_private(name):
                used.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    return used


def package_classes():
    for module in pkgutil.walk_packages(modeling_querit.__path__, "modeling_querit."):
        # They act when they are imported.
        if not module.name.endswith(("__main__", "fresh_process")):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__ == module.name:
                    yield value


def overridden_names():
    """Private name of a transformers class -> classes of the package that override it."""
    overridden = {}
    for owner in package_classes():
        bases = [base for base in owner.__mro__ if base.__module__.partition(".")[0] == "transformers"]
        for name in filter(is_private, vars(owner)):
            # ABCMeta's own, in every class that it makes.
            if name != "_abc_impl" and any(name in vars(base) for base in bases):
                overridden.setdefault(name, set()).add(owner.__name__)
    return overridden


def resolve(path):
    """The object at a dotted path, with instances where it says `()`."""
    first, *parts = path.split(".")
    value, name = importlib.import_module(first), first
    for part in parts:
        name += f".{part}"
        attribute = part.removesuffix("()")
        value = getattr(value, attribute) if hasattr(value, attribute) else importlib.import_module(name)
        value = value() if part.endswith("()") else value
    return value


# Names that the oldest supported transformers, 5.17, does not have yet; the package asks for them by getattr.
NEWER_THAN_5_17 = {"transformers.integrations.moe:_is_expert_parallel"}


@pytest.mark.parametrize("entry", PRIVATE_NAMES)
def test_private_names_are_still_there(entry):
    if entry in NEWER_THAN_5_17 and transformers.__version__.startswith("5.17."):
        return
    owner, separator, name = entry.rpartition(":") if ":" in entry else entry.rpartition(".")
    if separator == ":":
        there = name in inspect.getsource(importlib.import_module(owner))
    else:
        there = hasattr(resolve(owner), name)
    assert there, f"{entry} is gone; it was used for this: {PRIVATE_NAMES[entry]}"


@pytest.mark.slow
def test_no_other_private_name_is_used():
    known = {*map(last_of, PRIVATE_NAMES), *defined_here(), *DOCUMENTED}
    unlisted = {name: files for name, files in names_used().items() if name not in known}
    assert not unlisted, f"use public names, or list these with their reason in PRIVATE_NAMES: {unlisted}"


def test_no_other_private_name_of_transformers_is_overridden():
    unlisted = {
        name: classes for name, classes in overridden_names().items() if name not in map(last_of, PRIVATE_NAMES)
    }
    assert not unlisted, f"list these with their reason in PRIVATE_NAMES: {unlisted}"


@pytest.mark.slow
def test_the_list_holds_nothing_that_is_not_used():
    used = names_used().keys() | overridden_names().keys()
    unused = [entry for entry in PRIVATE_NAMES if last_of(entry) not in used]
    assert not unused, f"nobody uses these any more: {unused}"
