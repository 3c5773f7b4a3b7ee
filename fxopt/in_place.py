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
_NODE = re.compile(r'^\s*(\w+): "\w+\[([^\]]*)\][^"]*" = torch\.ops\.\w+\.(\w+)')


@dataclass(frozen=True)
class InPlaceProof:
    """What was found in one compiled graph; empty ``copies`` is the proof."""

    writes: int  # index_put_ into a cache buffer
    copies: tuple[str, ...]  # lines that move as much as one buffer

    @property
    def holds(self) -> bool:
        return not self.copies


def prove_in_place(graph_text: str, facts: Facts, batch: int, window: str = "") -> InPlaceProof:
    """Read the text of a final graph.

    The symbol ``window`` counts as the whole capacity; any other one counts tokens of this step,
    which are activations and no cache.
    """
    shapes = {buffer.shape(batch, facts.capacity) for buffer in facts.buffers()}
    pairs = map(facts.rows, range(len(facts.layers)))
    # By size whatever is as large as the numbers of a cache; scales are small, and are known by their shape.
    smallest = min(math.prod(rows.buffers[0].shape(batch, facts.capacity)) for pair in pairs for rows in pair)
    writes, copies = 0, []
    for line in graph_text.splitlines():
        found = _NODE.match(line)
        if found is None:
            continue
        name, sizes, op = found.groups()
        found_shape = tuple(_size(size.strip(), window, facts.capacity) for size in sizes.split(","))
        if math.prod(found_shape) < smallest and found_shape not in shapes:
            continue
        if op == "index_put_":
            writes += 1
        elif op in COPIES:
            copies.append(f"{name}: {op} of [{sizes}]")
    return InPlaceProof(writes, tuple(copies))


def _size(text: str, window: str, capacity: int) -> int:
    if text.isdigit():
        return int(text)
    return capacity if text == window else 1
