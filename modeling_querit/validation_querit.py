"""Checks of a saved folder before anything is built from it: its config, weight index and weight headers."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, PreTrainedConfig
from transformers.activations import ACT2FN

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Names of data types in the safetensors format.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
# The largest index or config on the Hub is a tenth of this.
_MAX_JSON_BYTES = 64 * 1024**2
# Maximum length of what a library says in one of our messages, in characters.
_MAX_REASON = 90
# No decoder has a size beyond it, and arithmetic on sizes below it cannot overflow.
_MAX_INTEGER = 2**40
# Lists of this length are made while a config is read, before anything is known about the weights.
_MAX_LAYERS = 10_000
# Tables, masks and frequencies that a model computes when it is built and no weight file holds, in bytes.
_MAX_BUFFER_BYTES = 2 * 1024**3
# Weights that may be missing until loading names them, in elements: so many are allocated for nothing.
_MAX_MISSING = 64 * 1024**2
_POSITIVE_INTEGERS = {
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "num_experts_per_tok"),
    *("n_routed_experts", "num_experts", "num_local_experts"),
}
_POSITIVE_NUMBERS = {
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta", "partial_rotary_factor"),
}
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function"}
_IMPLEMENTATIONS = {"attn_implementation", "_attn_implementation"}
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
_PICKLES = ("pytorch_model*.bin*", "*.bin", "*.pt", "*.pth", "*.ckpt")

# Models by class and config that have computed on the meta device: parents of a merge are alike.
_COMPUTED: set[str] = set()


class TensorHeader(NamedTuple):
    """What a safetensors file says about one tensor.

    Args:
        path: File that holds the tensor.
        offset: Position of its first byte in the file.
        dtype: Data type of the tensor.
        shape: Shape of the tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def one_line(error: object, limit: int = _MAX_REASON) -> str:
    """The message of an error in one line of limited length, for the middle of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, not JSON, not an object, or too large or too deep for what it is.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write the folder again, or name another one.")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: too many for such a file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}): write it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object, but a {type(content).__name__}: write it again.")
    return content


# The config


def check_config(config: Mapping[str, Any], place: str | os.PathLike[str]) -> None:
    """Check what transformers does not check in a config before it builds a model from it.

    Args:
        config: Content of `config.json`, in Querit's or a published layout, or of a plain decoder.
        place: Name of the file, for the error message.

    Raises:
        ValueError: if a key is missing or has an impossible value; the message names file and key.
    """

    def refuse(key: str, value: object, why: str) -> None:
        raise ValueError(f"{place}: {key} is {_shown(value)}, {why}.")

    is_querit = config.get("model_type") == "querit"
    backbone = config.get("text_config") if is_querit else config
    if is_querit and not isinstance(backbone, dict):
        refuse("text_config", backbone, "not the config of a backbone")
    model_type = backbone.get("model_type")  # type: ignore[union-attr]
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        refuse("model_type", model_type, "which this transformers does not know: name that of a causal decoder")
    if "transformers_weights" in config:
        refuse("transformers_weights", config["transformers_weights"], f"but weights are read from {WEIGHTS_FILE}")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        refuse("architectures", classes, "not a list of names")
    for settings in (config, backbone):
        _check_values(settings, refuse)  # type: ignore[arg-type]
    _check_experts(backbone, refuse)  # type: ignore[arg-type]
    layers = backbone.get("num_hidden_layers")  # type: ignore[union-attr]
    for key in ("layer_types", "mlp_layer_types"):
        types = backbone.get(key)  # type: ignore[union-attr]
        if isinstance(types, list) and layers is not None and len(types) != layers:
            raise ValueError(f"{place}: {key} has {len(types)} entries, but num_hidden_layers is {layers}.")


def _check_values(settings: Mapping[str, Any], refuse: Callable[[str, object, str], None]) -> None:
    for key, value in _entries(settings):
        if isinstance(value, float) and not math.isfinite(value):
            refuse(key, value, "not a finite number")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and abs(value) > _MAX_INTEGER and "theta" not in key:
            refuse(key, value, "which is too large")
        if key.endswith("layers") and isinstance(value, int) and value > _MAX_LAYERS:
            refuse(key, value, f"more than {_MAX_LAYERS:,}")
        if value is None:
            continue
        if key in _POSITIVE_INTEGERS and not _is_count(value):
            refuse(key, value, "not an integer of at least 1")
        if key in _POSITIVE_NUMBERS and not (is_number and value > 0):
            refuse(key, value, "not a number above 0")
        if key.endswith(("dropout", "pdrop")) and not (is_number and 0 <= value <= 1):
            refuse(key, value, "not a probability")
        if key in ("dtype", "torch_dtype") and not _is_float_dtype(value):
            refuse(key, value, "not a data type of weights, such as bfloat16")
        if key in _ACTIVATIONS and not (isinstance(value, str) and value in ACT2FN):
            refuse(key, value, "an activation that transformers does not know")
        if key in _IMPLEMENTATIONS and value not in ("eager", "sdpa", "flex_attention", *_attention_functions()):
            refuse(key, value, "an attention kernel that transformers does not know: remove it")
    quantization = settings.get("quantization_config")
    if quantization is not None:
        # Here, since it may import torchao, which takes half a second.
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        # transformers derives the number of bits of bitsandbytes from another key.
        known = ("bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING)
        if not isinstance(method, str) or method not in known:
            refuse("quantization_config", method, "a quantization that transformers does not know")


def _check_experts(backbone: Mapping[str, Any], refuse: Callable[[str, object, str], None]) -> None:
    count = next((backbone[key] for key in _EXPERT_COUNTS if isinstance(backbone.get(key), int)), None)
    per_token = backbone.get("num_experts_per_tok")
    if count is not None and isinstance(per_token, int) and per_token > count:
        refuse("num_experts_per_tok", per_token, f"but there are {count} experts")
    groups, groups_per_token = backbone.get("n_group"), backbone.get("topk_group")
    if count is not None and groups is not None and (not _is_count(groups) or count % groups):
        refuse("n_group", groups, f"but {count} experts cannot be divided into as many groups")
    fits = groups_per_token is None or (_is_count(groups_per_token) and groups_per_token <= (groups or 1))
    if groups is not None and not fits:
        refuse("topk_group", groups_per_token, f"but there are {groups} groups of experts")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _entries(settings: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings with the nearest key above it."""
    yield key, settings
    if isinstance(settings, Mapping):
        for inner, value in settings.items():
            if inner != "text_config":
                yield from _entries(value, str(inner))
    elif isinstance(settings, list):
        for value in settings:
            yield from _entries(value, key)


def _is_float_dtype(name: object) -> bool:
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def _attention_functions() -> list[str]:
    return [*AttentionInterface().valid_keys(), "flash_attention_2", "flash_attention_3"]


def _shown(value: object) -> str:
    return "null or missing" if value is None else one_line(repr(value), 40)


# The weights


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model's folder as transformers chooses them; only safetensors, only in the folder.

    Raises:
        FileNotFoundError: if there are none, or one in the index is missing.
        ValueError: if the index is damaged or leads out of the folder.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder / INDEX_FILE).values()))]
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    reason = f", and {pickles[0]} may run code when it is loaded: save it as safetensors" if pickles else ""
    raise FileNotFoundError(f"{folder} has no safetensors files: weights in other formats are not read{reason}.")


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of a model's weight files: key -> what its file says about the tensor.

    Raises:
        FileNotFoundError, ValueError: as in `weight_files`, or if a file is damaged, or lacks a key of the index.
    """
    files = weight_files(folder)
    headers = {path: dict(read_header(path)) for path in files}
    if files != [folder / WEIGHTS_FILE]:
        for key, name in _weight_map(folder / INDEX_FILE).items():
            if key not in headers[folder / name]:
                raise ValueError(f"{folder / INDEX_FILE} says that {name} has {one_line(key)}, but it does not.")
    return {key: header for entries in headers.values() for key, header in entries.items()}


def read_header(path: Path) -> Iterator[tuple[str, TensorHeader]]:
    """Read the header of a safetensors file: keys, and what the file says about each tensor.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged, or a data type is none of torch's; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, although the index lists it.")
    try:
        # Checks the header, and the length of the file against it.
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or truncated ({one_line(error)}).") from None
    if metadata is not None and metadata.get("format", "pt") != "pt":
        raise ValueError(f"{path} has the format {_shown(metadata['format'])} in its header, not 'pt'.")
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key} has the unsupported dtype {entry['dtype']}.")
        start = 8 + length + entry["data_offsets"][0]
        yield key, TensorHeader(path, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json_object(index)
    for key, kind in (("weight_map", "from keys to files"), ("metadata", "with the total size")):
        if not isinstance(content.get(key), dict) or (key == "weight_map" and not content[key]):
            raise ValueError(f"{index} is damaged: {key} is {_shown(content.get(key))}, not an object {kind}.")
    if not _is_float_dtype(dtype := content["metadata"].get("dtype", "float32")):
        raise ValueError(f"{index} is damaged: metadata has the dtype {_shown(dtype)}.")
    for key, name in content["weight_map"].items():
        # A path would lead to a file that is not part of the folder.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise ValueError(
                f"{index} is damaged: {one_line(key)} is in {_shown(name)}, which is not a safetensors file beside it."
            )
    return content["weight_map"]


# Config and weights together


def check_model(
    folder: Path, config: PreTrainedConfig, build: Callable[[PreTrainedConfig], nn.Module]
) -> dict[str, TensorHeader]:
    """Check that a config describes a model that can compute, and that its weights are in the folder.

    Nothing is allocated: the model is built on the meta device. Whether each weight has its place is checked when they
    are loaded; here only their total, which bounds the memory that loading takes.

    Args:
        folder: Folder of the model.
        config: Its config.
        build: Function that builds the model.

    Returns:
        Headers of the weights.

    Raises:
        FileNotFoundError, ValueError: as in `read_headers`, or if config and weights do not go together.
    """
    headers, place = read_headers(folder), folder / CONFIG_FILE
    _check_counts(config.get_text_config().to_dict(), headers, place)

    def build_from(content: dict[str, Any]) -> nn.Module:
        trial = type(config).from_dict(content)
        with torch.device("meta"):
            return build(trial)

    def compute_from(content: dict[str, Any]) -> None:
        _compute_on_meta(build_from(content))

    content = config.to_dict()
    quantization = content.pop("quantization_config", None)
    try:
        model = build_from(copy.deepcopy(content))
    except Exception as error:
        if _is_undecided(error):
            return headers
        raise _config_error(content, build_from, error, place) from error
    _check_total(model, config.get_text_config().to_dict(), headers, bool(quantization), place)
    described = json.dumps([type(model).__qualname__, content], default=str)
    if described in _COMPUTED:
        return headers
    try:
        _compute_on_meta(model)
        _COMPUTED.add(described)
    except Exception as error:
        # A model that does not compute on the meta device for reasons of its own is not at fault.
        if not _is_undecided(error) and find_culprit(content, compute_from, error) is not None:
            raise _config_error(content, compute_from, error, place) from error
    return headers


def _check_counts(settings: Mapping[str, Any], headers: Mapping[str, TensorHeader], place: Path) -> None:
    """Check numbers of modules, which take time and memory to build even on the meta device."""
    most_experts = max([len(headers), *(header.shape[0] for header in headers.values() if header.shape)])
    for key, value in _entries(settings):
        if _is_count(value) and key in _LAYER_COUNTS and value > len(headers):
            raise ValueError(f"{place}: {key} is {value}, but the weights have {len(headers)} tensors.")
        if _is_count(value) and key in _EXPERT_COUNTS and value > most_experts:
            raise ValueError(f"{place}: {key} is {value}, more than the weights have.")


def _check_total(
    model: nn.Module,
    settings: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    is_quantized: bool,
    place: Path,
) -> None:
    needed = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(header.shape) for header in headers.values())
    if is_quantized:
        # At least one bit for every weight.
        stored = sum(8 * math.prod(header.shape) * header.dtype.itemsize for header in headers.values())
    if needed > 2 * stored + _MAX_MISSING:
        sizes = {key: value for key, value in _entries(settings) if _is_count(value) and not key.endswith("_id")}
        key = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"{place} describes a model of {needed:.3g} parameters, but the weights beside it have {stored:,}: it is "
            f"not the config of these weights ({key} is {sizes[key]})."
        )
    persistent = model.state_dict().keys()
    computed = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in persistent)
    if computed > _MAX_BUFFER_BYTES:
        raise ValueError(f"{place} describes a model with tables of {computed:,} bytes: lower max_position_embeddings.")
    for key, parameter in model.named_parameters():
        header = headers.get(key)
        if header is not None and not is_quantized and not header.dtype.is_floating_point:
            raise ValueError(f"{header.path}: {key} is stored as {header.dtype}, not as floating-point numbers.")
        if parameter.numel() == 0:
            raise ValueError(f"{place} describes a model in which {key} has the shape {tuple(parameter.shape)}.")


@torch.no_grad()
def _compute_on_meta(model: nn.Module) -> None:
    backbone: Any = getattr(model, "model", model)
    for kind, name in (("attn", "eager"), ("experts", "batched_mm")):
        with contextlib.suppress(Exception):
            getattr(backbone, f"set_{kind}_implementation")(name)
    dtype = next(backbone.parameters()).dtype
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 2, 2, dtype=dtype, device="meta")
    backbone.eval()(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)


def _is_undecided(error: Exception) -> bool:
    """Whether an error says that something cannot be computed without weights."""
    return isinstance(error, NotImplementedError | MemoryError) or "meta" in str(error).lower()


def _config_error(
    content: dict[str, Any], attempt: Callable[[dict[str, Any]], object], error: Exception, place: str | Path
) -> ValueError:
    key = find_culprit(content, attempt, error)
    if key is None:
        return ValueError(f"{place} describes no model that can be built ({one_line(error)}).")
    value = content.get(key, (content.get("text_config") or {}).get(key))
    return ValueError(f"{place}: {key} is {_shown(value)}, with which no model can be built ({one_line(error)}).")


def find_culprit(
    content: Mapping[str, Any], attempt: Callable[[dict[str, Any]], object], error: Exception
) -> str | None:
    """Find the key of a config without which, at its default, an attempt succeeds that failed with it.

    Args:
        content: The config.
        attempt: Function of a config that raised the error.
        error: Error that it raised; keys that it names are tried first.
    """
    backbone = content.get("text_config")
    keys: list[tuple[str | None, str]] = [(None, key) for key in content]
    keys += [("text_config", key) for key in backbone] if isinstance(backbone, Mapping) else []
    for part, key in sorted(keys, key=lambda pair: pair[1] not in str(error)):
        if key in ("model_type", "text_config"):
            continue
        trial = copy.deepcopy(dict(content))
        del (trial[part] if part else trial)[key]
        with contextlib.suppress(Exception):
            attempt(trial)
            return key
    return None


def check_builds(config_class: type[PreTrainedConfig], content: dict[str, Any], place: str | os.PathLike[str]) -> None:
    """Check that a config can be made of the content of a file.

    Raises:
        ValueError: if it cannot; the message names file and key.
    """

    def attempt(trial: dict[str, Any]) -> PreTrainedConfig:
        return config_class(**trial)

    try:
        attempt(copy.deepcopy(content))
    except Exception as error:
        raise _config_error(content, attempt, error, Path(place)) from error
