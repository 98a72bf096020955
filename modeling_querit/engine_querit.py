"""One forward pass over a pack of pairs: everything once a token, and in the last layer only what is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .attention_querit import CURRENT_RUN, NAME, CannotPack, Run, States
from .packing_querit import Pack, plan_packs
from .precision_querit import Float32Arithmetic, Int8Arithmetic, fastest_arithmetic

# Parts of a decoder layer that compute each token for itself, under the names that transformers gives them. Keys and
# values are not among them: the last layer needs those of all tokens.
_PER_TOKEN = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp",
    "post_feedforward_layernorm",
)
# By the id of a config, which several models may have in common; should another get that id, the lock is as good.
_LOCKS: dict[int, threading.RLock] = {}


def exclusive(model: Any) -> threading.RLock:
    """A lock: a run changes the model's attention and mode for as long as it takes, so one at a time for a model."""
    return _lock_of(model.model.config)


def _lock_of(config: Any) -> threading.RLock:
    return _LOCKS.setdefault(id(config), threading.RLock())


def score_pack(
    model: Any, pack: Pack, carried: States, *, reads_last_only: bool = True, converts: bool = True
) -> tuple[Tensor, States]:
    """Scores of a pack's pairs.

    Args:
        model: A `QueritForSequenceRanking`, in evaluation mode.
        pack: The pairs.
        carried: What the call for the pack before returned, if `pack.carried`.
        reads_last_only: Whether the last layer leaves out what nobody reads.
        converts: Whether to compute as `fastest_arithmetic` says for this processor, and with int8 weights by
            `Int8Arithmetic`.

    Returns:
        p1 - p0, (pairs,) in float32, in the order of `pack.pairs`; and the states of `pack.keeps`.

    Raises:
        CannotPack: if the backbone's attention is not one that packs can stand for.
    """
    config = model.model.config
    last_layer = config.num_hidden_layers - 1 if reads_last_only else None
    with exclusive(model):
        run = Run(pack, carried, config._attn_implementation, last_layer)
        states = read_pack(model, run, **inputs_of(pack, model.device), converts=converts)
        return _scores(model.score(states)), run.kept


def inputs_of(pack: Pack, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`input_ids` and `position_ids` of a pack, (1, tokens) each."""
    rows = {"input_ids": pack.input_ids, "position_ids": pack.position_ids}
    return {name: torch.tensor([values], device=device) for name, values in rows.items()}


def read_pack(model: Any, run: Run, input_ids: Tensor, position_ids: Tensor, *, converts: bool = False) -> Tensor:
    """The final hidden states that are read of a run's pack, (pairs, hidden); differentiable."""
    backbone = model.model
    # A mask of four dimensions is handed on as it is, so none is made; our attention looks at the run.
    no_mask = torch.empty(1, 1, 0, 0, device=input_ids.device)
    with _Running(run, backbone.config), _reading_rows_only(backbone, run):
        hidden_states = _forward(
            model, input_ids, converts=converts, attention_mask=no_mask, position_ids=position_ids
        )[0]
    if len(hidden_states) == len(run.pack.pairs):
        return hidden_states
    return hidden_states[run.read_rows(hidden_states.device)]


def contexts_of_checkpointing(backbone: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds a layer in the forward pass, and again when a backward pass computes it once more.

    For `context_fn` of `torch.utils.checkpoint`: by the backward pass, a run is over, and on a GPU that pass has a
    thread of its own.
    """
    run = CURRENT_RUN.get()
    return nullcontext(), nullcontext() if run is None else _Running(run, backbone.config)


def score_padded(model: Any, input_ids: Tensor, attention_mask: Tensor, *, converts: bool = True) -> Tensor:
    """Scores of pairs padded on the left, (pairs,) in float32; `converts` as in `score_pack`."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden_states = _forward(
        model, input_ids, converts=converts, attention_mask=attention_mask, position_ids=position_ids
    )
    return _scores(model.score(hidden_states[:, -1]))


def attends_plainly(backbone: nn.Module) -> bool:
    """Whether packs can go through a backbone: it has nothing but (sliding) attention, by transformers' interface."""
    kinds = set(getattr(backbone.config, "layer_types", None) or ["full_attention"])
    return (
        kinds <= {"full_attention", "sliding_attention"}
        and not rotates_by_length(backbone)
        and getattr(backbone, "_supports_attention_backend", False)
        and not getattr(backbone, "_is_stateful", False)
    )


def rotates_by_length(backbone: nn.Module) -> bool:
    """Whether its position embeddings depend on the longest text of a batch: then each text is a batch by itself."""
    parameters = getattr(backbone.config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layer.
    kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    return any(each.get("rope_type") in ("dynamic", "longrope") for each in kinds)


def can_pack(model: Any) -> bool:
    """Whether packs go through a model in training: tried out, with two tokens."""
    if not attends_plainly(model.model) or getattr(model.model.config, "attention_dropout", 0.0):
        return False
    pack = next(plan_packs([[0, 0]], [[0]], batch_tokens=2))
    try:
        with torch.no_grad(), exclusive(model):
            read_pack(
                model, Run(pack, {}, model.model.config._attn_implementation, None), **inputs_of(pack, model.device)
            )
    except CannotPack:
        return False
    return True


def _forward(model: Any, input_ids: Tensor, *, converts: bool, **kwargs: Any) -> Tensor:
    """Final hidden states, (batch, sequence, hidden), without a cache."""
    inputs = {"input_ids": input_ids}
    states, products = fastest_arithmetic(model.device, model.dtype)
    with ExitStack() as modes:
        if converts and states != model.dtype:
            inputs = {"inputs_embeds": model.get_input_embeddings()(input_ids).to(states)}
            modes.enter_context(Float32Arithmetic(products))
        if converts and getattr(model, "is_quantized", False):
            modes.enter_context(Int8Arithmetic())
        return model.model(**inputs, use_cache=False, **kwargs).last_hidden_state


def _scores(logits: Tensor) -> Tensor:
    return torch.tanh((logits[:, 1] - logits[:, 0]) / 2)


class _Running:
    """While it lasts, attention is that of the run."""

    def __init__(self, run: Run, config: Any):
        self.run, self.config = run, config

    def __enter__(self) -> None:
        _lock_of(self.config).acquire()
        # A backward pass comes by the same modules again.
        self.run.seen.clear()
        self.token = CURRENT_RUN.set(self.run)
        self.config._attn_implementation = NAME

    def __exit__(self, *_: object) -> None:
        self.config._attn_implementation = self.run.implementation
        CURRENT_RUN.reset(self.token)
        _lock_of(self.config).release()


@contextmanager
def _reading_rows_only(backbone: nn.Module, run: Run) -> Iterator[None]:
    """Cut the inputs of the last layer's per-token parts, and its output, down to the rows that are read."""
    if run.last_layer is None:
        yield
        return
    layers = getattr(backbone, "layers", None)
    parts = dict(layers[-1].named_modules()) if layers else {}
    handles = []

    def cut(module: nn.Module, args: tuple) -> tuple | None:
        if CURRENT_RUN.get() is not run:
            return None
        hidden_states, *others = args
        return hidden_states[:, run.read_rows(hidden_states.device)], *others

    def put_back(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if CURRENT_RUN.get() is not run:
            return None
        whole = output.new_zeros(1, len(run.pack), *output.shape[2:])
        whole[:, run.read_rows(output.device)] = output
        return whole

    def cut_output(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        # Some layers return more than states.
        if CURRENT_RUN.get() is not run or not isinstance(output, Tensor):
            return None
        return output[:, run.read_rows(output.device)]

    for part in filter(None, map(parts.get, _PER_TOKEN)):
        handles += part.register_forward_pre_hook(cut), part.register_forward_hook(put_back)
    if layers:
        handles.append(layers[-1].register_forward_hook(cut_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
