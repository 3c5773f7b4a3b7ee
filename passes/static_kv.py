"""A cache that is written in place instead of growing.

    key_0: [B, H, past, D]                       key_0: [B, H, capacity, D]
    k = cat([key_0, new], 2)      becomes        k = index_copy_(key_0, 2, cache_position, new)
    arange(past + S)                             arange(N)
    arange(S) + past                             arange(S) + cache_position[0]

The number of past tokens occurs in two kinds of place. As a *size* it becomes the length of the
attention mask, N: all rows of the buffer. As a *value* it becomes a tensor, the first row that
this step writes. The model's own mask arithmetic then comes out right, whatever it is. One
buffer per layer for K and one for V: stacked buffers cost Inductor a copy of the whole cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.lengths import ROWS, Lengths
from fxopt.program import CACHE_POSITION, INPUT_IDS, POSITION_IDS, Program, key_name, value_name
from fxopt.rewrite import Pass
from fxopt.views import Concat, swap_argument

aten = torch.ops.aten


@dataclass(frozen=True)
class Growth:
    """``node = cat([past, new])`` for the K or the V of one layer."""

    node: Node
    past: Node
    concat: Concat | None


@dataclass(frozen=True)
class StaticKV(Pass[Growth]):
    name = "static_kv"
    summary = "writes K and V into preallocated buffers instead of concatenating"
    required = True

    def expected(self, program: Program) -> int:
        return 2 * len(program.facts.layers)

    def find(self, program: Program) -> Iterator[Growth]:
        inputs = program.placeholders()
        for layer in range(len(program.facts.layers)):
            for past in (inputs[key_name(layer)], inputs[value_name(layer)]):
                readers = [user for user in past.users if user.target is not aten.sym_size.int]
                if CACHE_POSITION in inputs:  # done before
                    continue
                concat = Concat.of(readers[0]) if len(readers) == 1 else None
                yield Growth(readers[0] if readers else past, past, concat)

    def refuse(self, program: Program, site: Growth) -> str | None:
        if site.concat is None:
            readers = ", ".join(str(user) for user in site.past.users) or "nothing"
            return f"{site.past} is read by {readers}, not by one cat with the new rows"
        if site.concat.dim != ROWS or len(site.concat.parts) != 2 or site.concat.parts[0] is not site.past:
            return f"{site.node} does not append new rows behind the past ones"
        return None

    def rewrite(self, program: Program, site: Growth) -> None:
        assert site.concat is not None
        inputs = program.placeholders()
        step = inputs[INPUT_IDS].meta["val"].shape[1]
        position = inputs.get(CACHE_POSITION)
        if position is None:
            with program.fake_mode:
                rows = torch.empty(step, dtype=torch.long, device=program.facts.device)
            position = program.add_input(CACHE_POSITION, rows, after=inputs[POSITION_IDS])
        with program.graph.inserting_before(site.node):
            write = program.graph.call_function(
                aten.index_copy_.default, (site.past, ROWS, position, site.concat.parts[1])
            )
        outputs = program.output()
        swap_argument(outputs, site.node, None)  # written in place: no longer handed out
        site.node.replace_all_uses_with(write)
        program.graph.erase_node(site.node)

    def finish(self, program: Program, matched: int) -> None:
        if matched == 0:
            return
        program.output().args = ((program.logits(),),)
        Lengths(program).rewrite()
