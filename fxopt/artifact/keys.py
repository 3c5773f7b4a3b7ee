"""What a saved model was made for, key by key, and the first of them that is another here."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fxopt.artifact.plain import expect, from_plain, to_plain
from fxopt.errors import ArtifactError
from fxopt.registry import catalogue
from fxopt.rewrite import Pass

#: Of a config: what says where it came from, or what the weights say better.
_VOLATILE = ("transformers_version", "architectures", "dtype", "torch_dtype")
_NOTHING = object()


@dataclass(frozen=True)
class Recipe:
    """How a model was optimised: the options, the passes that were kept, and why others were taken out."""

    options: Mapping[str, Any]
    passes: tuple[Pass[Any], ...]
    dropped: Mapping[str, str] = field(default_factory=dict)


def keys_of(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Everything that the graphs depend on, in the order in which it is compared."""
    return {
        "fxopt": _version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "model class": class_name(type(model)),
        "config": _config(model),
        "weights": _weights(model),
        "device": model.device.type,
        "options": to_plain(recipe.options),
        "passes": [pass_record(one) for one in recipe.passes],
        "dropped": dict(recipe.dropped),
    }


def processor_of(device: torch.device) -> str:
    """What compiled code was made for. Other processors might not know its instructions."""
    machine = f"{platform.system()} {platform.machine()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {machine}"
    return f"{torch.backends.cpu.get_cpu_capability()}, {machine}"


AGAIN = "what was saved fits that model and that machine only. Optimise again, and save"


def compare(saved: Mapping[str, Any], here: Mapping[str, Any], *, so: str = AGAIN) -> None:
    """Raise a sentence that names the first key with another value, and says what to do."""
    for name, value in here.items():
        difference = next(_differences(name, saved.get(name, _NOTHING), value), None)
        if difference is not None:
            place, before, now = difference
            raise ArtifactError(f"{place} differs: {_shown(before)} when it was saved, {_shown(now)} here; {so}")


def pass_record(rewriter: Pass[Any]) -> dict[str, Any]:
    """A pass by name, class and options."""
    options = {one.name: getattr(rewriter, one.name) for one in dataclasses.fields(rewriter)}  # type: ignore[arg-type]
    try:
        plain = to_plain(options)
    except TypeError as error:
        raise ArtifactError(f"an option of the pass {rewriter.name} cannot be saved: {error}") from None
    return {"name": rewriter.name, "class": class_name(type(rewriter)), "options": plain}


def check_in_catalogue(passes: Sequence[Pass[Any]]) -> None:
    """Raise a sentence on a pass that a new process could not find."""
    known = {kind.name: kind for kind in catalogue()}
    for one in passes:
        if known.get(one.name) is not type(one):
            raise ArtifactError(
                f"the pass {one.name} ({class_name(type(one))}) is not in the catalogue, so that a new process could "
                "not find it; register it (fxopt.register) and optimise with it by name"
            )


def pass_from(record: Any, where: str) -> Pass[Any]:
    """The pass that a record stands for, from the catalogue; no code is looked for elsewhere."""
    table = expect(dict, record, where)
    name, options = expect(str, table.get("name"), where), expect(dict, table.get("options"), where)
    kind = {one.name: one for one in catalogue()}.get(name)
    if kind is None or class_name(kind) != table.get("class"):
        found = "there is none of this name here" if kind is None else f"here it is {class_name(kind)}"
        raise ArtifactError(
            f"it was saved with the pass {name} ({str(table.get('class'))[:100]}), and {found}; install the package "
            "that brings it, or register it (fxopt.register), and load again"
        )
    hints = get_type_hints(kind)
    known = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if options.keys() != known:
        odd = sorted(map(str, options.keys() ^ known))[0]
        raise ArtifactError(f"the pass {name} was saved with other options than it has here, such as {odd!r}")
    return kind(**{key: from_plain(hints[key], value, f"{where}.{key}") for key, value in options.items()})


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight and buffer by every name that it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _config(model: PreTrainedModel) -> Any:
    """The config as JSON has it, without what begins with an underscore."""
    table = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in table.items() if name not in _VOLATILE and not name.startswith("_")}


def _weights(model: nn.Module) -> dict[str, str]:
    """Shape and dtype by name; a weight under a second name says whose memory it is."""
    first: dict[int, str] = {}
    table = {}
    for name, tensor in named_tensors(model):
        known = first.setdefault(id(tensor), name)
        shape = ", ".join(map(str, tensor.shape))
        table[name] = f"{to_plain(tensor.dtype)} [{shape}]" if known == name else f"the same as {known}"
    return table


def _differences(place: str, saved: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every place where two pieces of plain data differ, from the first."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*here, *saved]):
            yield from _differences(f"{place}.{name}", saved.get(name, _NOTHING), here.get(name, _NOTHING))
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        for number, (before, now) in enumerate(zip(saved, here, strict=True)):
            yield from _differences(f"{place}[{number}]", before, now)
    elif type(saved) is not type(here) or saved != here:
        yield place, saved, here


def _shown(value: Any) -> str:
    return "nothing" if value is _NOTHING else repr(value)[:200]


def _version() -> str:
    return str(vars(sys.modules["fxopt"])["__version__"])
