"""Attention over what is filled, not over all that was allocated.

    k = index_copy_(key_0, 2, cache_position, new)      k = slice(index_copy_(...), 2, 0, N)
    mask: [B, capacity]                         becomes  mask: [B, N]

``N`` is the length of the mask that the runtime hands in, a multiple of 64 that covers the filled
rows, and stays symbolic: one compiled graph serves every window. A step then costs what is in the
cache, however large ``max_len`` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.attention import RowWrite
from fxopt.program import ATTENTION_MASK, Program, key_name, value_name
from fxopt.rewrite import Pass
from fxopt.symbols import fresh_size
from fxopt.views import Miss, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class WindowKV(Pass[RowWrite]):
    name = "window_kv"
    summary = "attends to the filled part of the buffers; one compile for all windows"

    def expected(self, program: Program) -> int:
        return 2 * len(program.facts.layers)

    def find(self, program: Program) -> Iterator[RowWrite | Miss]:
        inputs = program.placeholders()
        if isinstance(shape(inputs[ATTENTION_MASK])[1], torch.SymInt):  # done before
            return
        for layer in range(len(program.facts.layers)):
            for name in (key_name(layer), value_name(layer)):
                write = RowWrite.into(inputs[name])
                yield write if write is not None else Miss(inputs[name], "no index_copy_ writes rows into it")

    def rewrite(self, program: Program, site: RowWrite) -> None:
        with program.graph.inserting_after(site.node):
            window = program.graph.call_function(aten.slice.Tensor, (site.node, 2, 0, self._rows(program)))
        site.node.replace_all_uses_with(window, delete_user_cb=lambda user: user is not window)

    def finish(self, program: Program, matched: int) -> None:
        if matched == 0:
            return
        mask = program.placeholders()[ATTENTION_MASK]
        old = mask.meta["val"]
        rows = fresh_size(program.shape_env, "window", hint=max(2, program.facts.capacity - 1))
        with program.fake_mode:
            mask.meta["val"] = torch.empty(old.shape[0], rows, dtype=old.dtype, device=old.device)

    @staticmethod
    def _rows(program: Program) -> Node:
        """The node that reads the length of the mask, which static_kv has put first."""
        mask = program.placeholders()[ATTENTION_MASK]
        return next(user for user in mask.users if user.target is aten.sym_size.int and user.args[1] == 1)
