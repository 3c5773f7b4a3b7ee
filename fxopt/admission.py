"""Can this be optimised? Every reason against it as a sentence, before any work is done."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from fxopt.capture import position_limit
from fxopt.errors import InvalidRequestError
from fxopt.lower import BACKENDS, COMPILES
from fxopt.model import FastModel
from fxopt.registry import Placed, catalogue, ordered
from fxopt.request import VERIFICATIONS, Request
from fxopt.rewrite import Pass, Stage

Selection = str | Iterable[str | Pass[Any] | type[Pass[Any]]] | Mapping[str, Any] | None

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Names for whole selections: whether a pass is in it.
PRESETS: dict[str, Callable[[Pass[Any]], bool]] = {
    "default": lambda rewriter: rewriter.by_default,
    "minimal": lambda rewriter: rewriter.required,
}


def admit(model: Any, request: Request) -> None:
    """Raise a sentence if the request cannot be served."""
    admit_request(model, request)
    _admit_values(model)


def admit_request(model: Any, request: Request) -> None:
    """The same for a model that may have no values: all but running it."""
    _admit_model(model)
    _admit_number("max_len", request.max_len, at_least=2)
    _admit_number("chunk", request.chunk, at_least=2)
    for name in ("max_batch", "max_cache_bytes"):
        if getattr(request, name) is not None:
            _admit_number(name, getattr(request, name), at_least=1)
    _admit_choice("backend", request.backend, BACKENDS)
    _admit_choice("compile", request.compile, COMPILES)
    _admit_choice("verify", request.verify, VERIFICATIONS)
    limit = position_limit(model)
    if limit is not None and request.max_len > limit:
        raise InvalidRequestError(
            f"max_len={request.max_len} is above the {limit} positions that {type(model).__name__} was made for; "
            f"ask for at most {limit}"
        )


def select(passes: Selection) -> tuple[Pass[Any], ...]:
    """The passes to apply, in pipeline order, from any form that a user may give."""
    known = {kind.name: kind for kind in catalogue()}
    every: dict[str, Pass[Any]] = {name: kind() for name, kind in known.items()}
    if passes is None:
        passes = "default"
    if isinstance(passes, str):
        if passes not in PRESETS:
            raise InvalidRequestError(_unknown("preset", passes, PRESETS))
        return tuple(p for p in every.values() if PRESETS[passes](p))
    if isinstance(passes, Mapping):
        chosen = {name: p for name, p in every.items() if PRESETS["default"](p)}
        for name, wanted in passes.items():
            _known_name(name, known)
            if isinstance(wanted, Pass):
                chosen[name] = wanted
            elif isinstance(wanted, Mapping):
                chosen[name] = _with_options(known[name], wanted)
            elif wanted is False:
                _leave_out(chosen, name)
            elif wanted is True:
                chosen.setdefault(name, every[name])
            else:
                raise InvalidRequestError(f"passes[{name!r}] is {wanted!r}; give True, False, options or a pass object")
        return tuple(chosen[name] for name in known if name in chosen)
    if not isinstance(passes, Iterable):
        raise InvalidRequestError(f"passes={passes!r} is neither a preset, nor names or passes, nor a mapping")
    named: dict[str, Pass[Any]] = {name: p for name, p in every.items() if p.required}
    for item in passes:
        rewriter = _as_pass(item, known)
        named[rewriter.name] = rewriter
    strangers = [rewriter for name, rewriter in named.items() if name not in known]
    order: tuple[Placed, ...] = ordered([*known.values(), *strangers])
    return tuple(named[one.name] for one in order if one.name in named)


def _as_pass(item: Any, known: Mapping[str, type[Pass[Any]]]) -> Pass[Any]:
    if isinstance(item, type) and issubclass(item, Pass):
        item = item()
    if isinstance(item, Pass):
        if item.stage is Stage.CODE and item.name not in known:
            raise InvalidRequestError(
                f"{item.name} is to speak to the compiler, which only fxopt's own passes can; use another stage"
            )
        return item
    if isinstance(item, str):
        _known_name(item, known)
        return known[item]()
    raise InvalidRequestError(f"{item!r} is no pass; give a name, a pass class or a pass object")


def _with_options(kind: type[Pass[Any]], options: Mapping[str, Any]) -> Pass[Any]:
    try:
        return kind(**options)
    except TypeError as error:
        raise InvalidRequestError(f"{kind.name} does not take these options: {error}") from None


def _leave_out(chosen: dict[str, Pass[Any]], name: str) -> None:
    if name not in chosen:
        return
    if chosen[name].required:
        raise InvalidRequestError(
            f"{name} cannot be left out: the runtime stands on the graph that it makes. "
            f"These can: {', '.join(p.name for p in chosen.values() if not p.required)}"
        )
    del chosen[name]


def _known_name(name: Any, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise InvalidRequestError(_unknown("pass", name, known))


def _unknown(kind: str, name: Any, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"there is no {kind} named {name!r}; {hint}"


def _admit_model(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, FastModel):
        raise InvalidRequestError(f"this {name} is optimised already; call fxopt.optimize on the stock model")
    if hasattr(model, "peft_config") or name.startswith("Peft"):
        raise InvalidRequestError(
            f"{name} carries PEFT adapters, which are not captured; merge them first (model.merge_and_unload())"
        )
    if not isinstance(model, PreTrainedModel):
        raise InvalidRequestError(f"a {name} was given, but a Hugging Face causal LM (PreTrainedModel) is needed")
    if model.config.is_encoder_decoder or not model.can_generate() or model.get_output_embeddings() is None:
        raise InvalidRequestError(
            f"{name} is no decoder-only causal LM; load the model with AutoModelForCausalLM.from_pretrained"
        )
    if (quantised := _quantised_weight(model)) is not None:
        raise InvalidRequestError(
            f"{name} is quantised ({quantised}); only plain float weights are supported so far. Load it de-quantised"
        )
    if model.training:
        raise InvalidRequestError(f"{name} is in training mode; call model.eval() first")
    _admit_modules(model)
    _admit_devices(model)


def _quantised_weight(model: PreTrainedModel) -> str | None:
    """The first weight that is not a plain float tensor. De-quantised checkpoints keep their flag, so look."""
    for name, parameter in model.named_parameters():
        if type(parameter.data) not in (torch.Tensor, FakeTensor):
            return f"{name} is a {type(parameter.data).__name__}"
        if parameter.dtype not in FLOATS:
            return f"{name} is {parameter.dtype}"
    packed = [name for name, buffer in model.named_buffers() if buffer.dim() > 1 and buffer.dtype not in FLOATS]
    return packed[0] if packed and getattr(model, "is_quantized", False) else None


def _admit_modules(model: PreTrainedModel) -> None:
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # Transformers leaves hooks behind that collect hidden states when asked, and do nothing else.
        foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]
        if foreign or hasattr(module, "_hf_hook"):
            where = path or type(model).__name__
            raise InvalidRequestError(
                f"{where} has forward hooks, which a captured graph would not run; remove them first"
            )


def _admit_devices(model: PreTrainedModel) -> None:
    parameters = dict(model.named_parameters())
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise InvalidRequestError(f"the weights lie on {' and '.join(devices)}; move the model to one device first")


def _admit_values(model: PreTrainedModel) -> None:
    if any(p.device.type == "meta" or isinstance(p.data, FakeTensor) for p in model.parameters()):
        raise InvalidRequestError("the weights are on the meta device and have no values; load the model first")


def _admit_number(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name}={value!r} is no whole number")
    if value < at_least:
        raise InvalidRequestError(f"{name}={value} is too small; give at least {at_least}")


def _admit_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InvalidRequestError(f"{name}={value!r} is not one of {', '.join(choices)}.{hint}")
