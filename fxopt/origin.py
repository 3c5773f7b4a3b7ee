"""Where a node comes from: the line of the model's code, and the decoder layer it belongs to."""

from __future__ import annotations

import re

from torch.fx import Node

_LAYER = re.compile(r"\.(?:layers|h|blocks)(?:\.|\[|slice\(.*?\)\.)(\d+)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def layer_of(node: Node) -> int | None:
    """The index of the decoder layer whose code a node stands for; None outside of any."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        found = _LAYER.search(str(path))
        if found is not None:
            return int(found.group(1))
    return None


def source_of(node: Node) -> str:
    """``modeling_llama.py:284`` for a node, from the innermost frame of the model's own code."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return "?"
    path, line = next((f for f in reversed(frames) if "modeling_" in f[0]), frames[-1])
    return f"{path.rsplit('/', 1)[-1]}:{line}"
