"""Where a node comes from: the line of the model's code, and the decoder layer it belongs to."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from torch.fx import Graph, Node

_LAYER = re.compile(r"\.(?:layers|h|blocks)(?:\.|\[|slice\(.*?\)\.)(\d+)")
_SLICE = re.compile(r"\.slice\((\w+), \w+, \w+\)\.(\d+)")
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


def name_modules(graph: Graph, names: Collection[str]) -> None:
    """Say of every node where its modules are in the model.

    Where layers share a module export has other words for it: ``layers.slice(1, 4, None).0`` is ``layers.1``,
    and a bare ``mlp`` is what the module above calls so.
    """
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(path not in names for path, _ in stack.values()):
            node.meta["nn_module_stack"] = _named(stack, names)


def _named(stack: dict[str, tuple[str, Any]], names: Collection[str]) -> dict[str, tuple[str, Any]]:
    named: dict[str, tuple[str, Any]] = {}
    above = ""
    for key, (path, kind) in stack.items():
        plain = _SLICE.sub(_place_in_list, path)
        inside = f"{above}.{plain}"
        above = inside if plain not in names and inside in names else plain
        named[key] = (above, kind)
    return named


def _place_in_list(taken: re.Match[str]) -> str:
    """Where an item of a slice stands in the whole list."""
    start, index = taken.groups()
    return f".{int(index) + (int(start) if start.isdigit() else 0)}"
