"""A Hugging Face causal LM as one symbolic graph.

``torch.export`` runs over a thin wrapper whose inputs are plain tensors: tokens, mask, positions,
and the keys and values of the past, already lying in the layers of a ``DynamicCache``. Batch,
step and past are symbols; all layers share one ``past``. What comes out is the model's own ATen
code with one ``cat`` per layer for K and one for V, which is what the passes want to rewrite.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fxopt.errors import CaptureError, first_line
from fxopt.origin import name_modules
from fxopt.program import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, Facts, KVShape, Program, key_name, value_name
from fxopt.size_proof import unproven
from fxopt.stand_in import standing_in
from fxopt.symbols import dimension
from fxopt.twins import Kinds, Recorder, decoder_layers
from fxopt.unfold import unfold

#: Sizes to trace with: different from each other and from 1, so that none is taken for another.
BATCH, STEP, PAST = 2, 3, 5

log = logging.getLogger("fxopt")

_lock = threading.Lock()


def capture(
    model: PreTrainedModel,
    *,
    max_len: int,
    capacity: int,
    backend: str = "eager",
    compile: str = "whole",
    twins: bool = True,
) -> Program:
    """Capture ``model``; its configuration is as it was, also after an error.

    With ``twins`` layers that do the same are traced once.
    """
    with _lock, _exportable(model), torch.no_grad():
        layers, dtype, output_class, recorder = _probe(model)
        facts = Facts(
            layers=layers,
            capacity=capacity,
            max_len=max_len,
            dtype=dtype,
            device=model.device,
            gated_mlps=_count_modules(model, [("gate_proj", "up_proj"), ("w1", "w3")]),
            split_qkv=_count_modules(model, [("q_proj", "k_proj", "v_proj"), ("query", "key", "value")]),
            grouped_layers=_count_grouped(model, layers),
            output_class=output_class,
            backend=backend,
            compile=compile,
        )
        wrapped = _TensorsIn(model)
        kinds = _kinds(wrapped, facts, recorder) if twins else Kinds()
        try:
            module = _traced(wrapped, facts, kinds)
        except CaptureError as error:
            if not kinds.has_twins:
                raise
            log.info("%s; trying again, every layer traced by itself", first_line(error))
            module = _traced(wrapped, facts, Kinds())
    return _program(module, facts)


def _traced(model: _TensorsIn, facts: Facts, kinds: Kinds) -> GraphModule:
    """The graph as export leaves it, with one layer of each kind traced."""
    with standing_in(kinds):
        exported = _export(model, facts)
    module = exported.module()
    name_modules(module.graph, {name for name, _ in model.named_modules(remove_duplicate=False)})
    unfold(module, model, kinds)
    return module


def position_limit(model: PreTrainedModel) -> int | None:
    """The number of positions a model can tell apart, if its config says so."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(model.config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


class _TensorsIn(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = POSITION_IDS in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        cache = _cache_holding(keys, values)
        positions = {POSITION_IDS: position_ids} if self.takes_positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        return output.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def _cache_holding(keys: list[Tensor], values: list[Tensor]) -> DynamicCache:
    """A cache that has these tensors already: starting empty would trace a cat with ``tensor([])``.

    Sliding layers are captured as full ones, since a trace would bake in HF's Python counters.
    """
    cache = DynamicCache()
    batch, _, past, _ = keys[0].shape
    for key, value in zip(keys, values, strict=True):
        for kept in (key, value):  # said now, or every layer would have to find it out
            torch._check(kept.shape[0] == batch and kept.shape[2] == past)
        layer = DynamicLayer()
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


@contextlib.contextmanager
def _exportable(model: PreTrainedModel) -> Iterator[None]:
    """Choose implementations that trace to ATen, and put the user's own back afterwards."""
    with contextlib.ExitStack() as stack:
        attention = model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
            stack.callback(model.set_attn_implementation, attention)
        if getattr(model.config, "_experts_implementation", None) != "batched_mm":
            # The eager form loops over the experts that were hit, which depends on the data.
            stack.enter_context(_experts_as(model, "grouped_mm"))
        yield


@contextlib.contextmanager
def _experts_as(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let a mixture compute its experts in another way for a while."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.config._experts_implementation = implementation
    try:
        yield
    finally:
        model.config._experts_implementation = before


def _probe(model: PreTrainedModel) -> tuple[tuple[KVShape, ...], torch.dtype, type, Recorder]:
    """Run two tokens; look at what the layers do and keep, and in what the result is handed out."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    cache = DynamicCache()
    recorder = Recorder(decoder_layers(model))
    experts = _experts_as(model, "batched_mm")  # the grouped form has no shapes for every dtype
    try:
        with experts, recorder.watching():
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot run two tokens with a DynamicCache: {first_line(error)}"
        ) from error
    shapes = []
    for index, layer in enumerate(cache.layers):
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(key, Tensor) and key.dim() == 4 and key.shape[2] > 2:
            raise CaptureError(
                f"layer {index} of {type(model).__name__} keeps {key.shape[2]} rows of two tokens: several layers "
                "write into its place of the cache, as those do that share an attention module; use the stock model"
            )
        if type(layer) is not DynamicLayer or key is None or value is None or key.dim() != 4 or key.shape[2] != 2:
            raise CaptureError(
                f"layer {index} of {type(model).__name__} keeps a {type(layer).__name__}, but only keys and values of "
                "shape [batch, heads, tokens, dim] are supported so far; use the stock model"
            )
        shapes.append(KVShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3]))
    if not shapes:
        raise CaptureError(f"{type(model).__name__} kept nothing in the cache it was given; use the stock model")
    return tuple(shapes), cache.layers[0].keys.dtype, type(output), recorder


def _kinds(model: _TensorsIn, facts: Facts, recorder: Recorder) -> Kinds:
    """Which layers do the same, also under the conditions of the trace: a past, and a mask that hides something."""
    if not any(isinstance(weight.data, FakeTensor) for weight in model.parameters()):  # else a mask has no values
        arguments = _arguments(facts)
        arguments[ATTENTION_MASK][0, 0] = 0
        with _experts_as(model.model, "batched_mm"), recorder.watching():
            model(**arguments)
    return recorder.kinds(facts.layers)


def _arguments(facts: Facts) -> dict[str, Any]:
    """What the wrapped model is traced with."""
    like: dict[str, Any] = {"dtype": facts.dtype, "device": facts.device}
    shapes = [layer.shapes(BATCH, PAST) for layer in facts.layers]
    return {
        INPUT_IDS: torch.zeros(BATCH, STEP, dtype=torch.long, device=facts.device),
        ATTENTION_MASK: torch.ones(BATCH, PAST + STEP, dtype=torch.long, device=facts.device),
        POSITION_IDS: torch.arange(PAST, PAST + STEP, device=facts.device).repeat(BATCH, 1),
        "keys": [torch.zeros(key, **like) for key, _ in shapes],
        "values": [torch.zeros(value, **like) for _, value in shapes],
    }


def _export(model: _TensorsIn, facts: Facts) -> ExportedProgram:
    layers = facts.layers
    limit = position_limit(model.model)
    longest = {"max": limit - 2} if limit is not None and limit > 16 else {}
    batch, step, past = Dim("batch"), Dim("step", **longest), Dim("past", **longest)
    dynamic = {
        INPUT_IDS: {0: batch, 1: step},
        ATTENTION_MASK: {0: batch, 1: Dim.AUTO},
        POSITION_IDS: {0: batch, 1: step},
        "keys": [{0: batch, 2: past}] * len(layers),
        "values": [{0: batch, 2: past}] * len(layers),
    }
    export = functools.partial(torch.export.export, model, (), _arguments(facts), dynamic_shapes=dynamic, strict=False)
    try:
        return export()
    except Exception as error:
        if _is_about_sizes(error) and (shown := _shown(export)) is not None:
            return shown
        raise CaptureError(
            f"{type(model.model).__name__} cannot be captured as one graph with symbolic lengths: {first_line(error)} "
            "The stock model is unchanged; models whose code branches on the length or on data are not supported yet."
        ) from error


def _is_about_sizes(error: Exception) -> bool:
    return isinstance(error, UserError) and error.error_type is UserErrorType.CONSTRAINT_VIOLATION


def _shown(export: Callable[..., ExportedProgram]) -> ExportedProgram | None:
    """The graph with what PyTorch cannot show of its sizes as assertions; None if we cannot, either."""
    try:
        exported = export(prefer_deferred_runtime_asserts_over_guards=True)
    except Exception as error:
        log.info("with comparisons of sizes as assertions: %s", first_line(error))
        return None
    by_name = {node.name: node for node in exported.graph.nodes}
    tokens, mask, _, keys, *_ = (by_name[name] for name in exported.graph_signature.user_inputs)
    width = dimension(mask, 1)
    known = {width: dimension(keys, 2) + dimension(tokens, 1)} if width.is_Symbol else {}
    claim = unproven(exported.graph, known)
    if claim is not None:
        log.info("the trace is right only where %s", claim)
        return None
    return exported


def _program(module: GraphModule, facts: Facts) -> Program:
    """Flatten the exported call: placeholders by our names, one flat tuple of outputs."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # export's check of its own input guards
            graph.erase_node(node)
    graph.set_codegen(CodeGen())
    names = [INPUT_IDS, ATTENTION_MASK, POSITION_IDS]
    names += [key_name(i) for i in range(len(facts.layers))] + [value_name(i) for i in range(len(facts.layers))]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.target = name
        node._rename(name)
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.users:  # read each weight where it is first used
            min(node.users).prepend(node)
    fake_mode = placeholders[0].meta["val"].fake_mode
    program = Program(GraphModule(module, graph, class_name="CausalLM"), facts, fake_mode)
    for node, weight in program.weights():
        if "val" not in node.meta:
            node.meta["val"] = fake_mode.from_tensor(weight, static_shapes=True)
    return program


def _count_grouped(model: PreTrainedModel, layers: tuple[KVShape, ...]) -> int:
    """How many layers keep fewer heads than the config gives the query, more than one."""
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    return sum(1 for layer in layers if isinstance(heads, int) and layer.key_heads < heads)


def _count_modules(model: nn.Module, families: list[tuple[str, ...]]) -> int:
    """How many modules have children of one of these names, each a plain linear layer."""

    def has(module: nn.Module, names: tuple[str, ...]) -> bool:
        return all(type(getattr(module, name, None)) is nn.Linear for name in names)

    return sum(any(has(module, names) for names in families) for module in model.modules())
