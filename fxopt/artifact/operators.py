"""Which operators a graph in a file may call: names are looked up here, and nowhere else."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from fxopt.errors import ArtifactError
from fxopt.onednn import is_built_in, onednn_linear

#: Python's own functions, as graphs use them on sizes and on what returns several tensors.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{function.__name__}": function
    for function in (
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg),
        *(operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    )
} | {"torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min, "torch.sym_not": torch.sym_not}

#: Libraries of operators. One that is registered elsewhere could do anything.
NAMESPACES = ("aten", "prims", "transformers", "fxopt")

#: The words that operators take. Others might be names of files.
WORDS = frozenset({"none", "tanh", "floor", "trunc", "mean", "sum", "constant", "reflect", "replicate"})

_NAME = re.compile(r"(\w+)\.(\w+)\.(\w+)")
_REFUSED = re.compile(r"_unsafe\w*|from_file|set_\w*|resize\w*|as_strided_(scatter|copy)?|from_blob|data|save|load")
_TAKEN = re.compile(
    r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|int|float|bool|number|str|Device|complex|NoneType)[\[\]]*"
)


def name_of(target: Any) -> str:
    """How a graph in a file names what it calls, or a sentence why it cannot."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        operator_of(name)
        return name
    for name, function in FUNCTIONS.items():
        if function is target:
            return name
    raise ArtifactError(
        f"the graph calls {getattr(target, '__name__', target)}, which cannot be saved: a new process looks up "
        f"operators of {', '.join(NAMESPACES)} and a few functions of Python only"
    )


def operator_of(name: str) -> Callable[..., Any]:
    """What a graph in a file calls by this name."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _NAME.fullmatch(name)
    if parts is None or parts[1] not in NAMESPACES or _REFUSED.fullmatch(parts[2]):
        raise ArtifactError(f"the graph calls {name[:80]!r}, which is not among the operators that a file may call")
    packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
    overload = getattr(packet, parts[3], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise ArtifactError(f"the graph calls {name!r}, which is not known here; was it saved with other versions?")
    if overload is onednn_linear and not is_built_in():
        raise ArtifactError(
            "the graph multiplies by oneDNN, and this PyTorch was built without it; optimize here again"
        )
    for parameter in overload._schema.arguments:
        if not _TAKEN.fullmatch(str(parameter.type)):
            raise ArtifactError(f"the graph calls {name!r}, which takes a {parameter.type}; a file may not call it")
    return overload
