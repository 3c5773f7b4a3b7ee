"""The in-place proof: in the graph that Inductor compiles, nothing copies a cache.

A rewrite that looks right can still make Inductor copy whole buffers each step: when the old value
is read after the write, when buffers are stacked, when a cat survived. This reads the text of the
final graph, after all of Inductor's own passes, and lists every op that moves a cache's worth.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fxopt.program import Facts

COPIES = frozenset(
    {"cat", "clone", "copy", "copy_", "index_put", "index_copy", "select_scatter", "slice_scatter", "constant_pad_nd"}
)
CACHE_RANK = 4  # [batch, heads, rows, dim]: activations of as many numbers have fewer dimensions
_NODE = re.compile(r'^\s*(\w+): "\w+\[([^\]]*)\][^"]*" = torch\.ops\.\w+\.(\w+)')


@dataclass(frozen=True)
class InPlaceProof:
    """What was found in one compiled graph; empty ``copies`` is the proof."""

    writes: int  # index_put_ into a cache buffer
    copies: tuple[str, ...]  # lines that move as much as one buffer

    @property
    def holds(self) -> bool:
        return not self.copies


def prove_in_place(graph_text: str, facts: Facts, batch: int) -> InPlaceProof:
    """Read the text of a final graph. A symbolic size counts as the whole capacity."""
    smallest = min(math.prod(shape) for layer in facts.layers for shape in layer.shapes(batch, facts.capacity))
    writes, copies = 0, []
    for line in graph_text.splitlines():
        found = _NODE.match(line)
        if found is None:
            continue
        name, sizes, op = found.groups()
        elements = math.prod(int(s) if s.strip().isdigit() else facts.capacity for s in sizes.split(",") if s.strip())
        if elements < smallest or len(sizes.split(",")) < CACHE_RANK:
            continue
        if op == "index_put_":
            writes += 1
        elif op in COPIES:
            copies.append(f"{name}: {op} of [{sizes}]")
    return InPlaceProof(writes, tuple(copies))
