"""Where a node comes from: the line of the model's code, and the decoder layer it belongs to."""

from __future__ import annotations

import re
from functools import lru_cache

from torch.fx import Node

_LAYER = re.compile(r"\.(?:layers|h|blocks)(?:\.|\[|slice\(.*?\)\.)(\d+)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def layer_of(node: Node) -> int | None:
    """The index of the decoder layer whose code a node stands for; None outside of any."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        layer = _layer_in(str(path))
        if layer is not None:
            return layer
    return None


def source_of(node: Node) -> str:
    """``modeling_llama.py:284`` for a node, from the innermost frame of the model's own code."""
    return _source_in(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)  # the same few lines of code, once for every layer and pass
def _layer_in(path: str) -> int | None:
    found = _LAYER.search(path)
    return int(found.group(1)) if found is not None else None


@lru_cache(maxsize=4096)
def _source_in(trace: str) -> str:
    frames = _FRAME.findall(trace)
    if not frames:
        return "?"
    path, line = next((f for f in reversed(frames) if "modeling_" in f[0]), frames[-1])
    return f"{path.rsplit('/', 1)[-1]}:{line}"
