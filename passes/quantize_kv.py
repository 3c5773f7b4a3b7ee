"""K and V in 8 or 4 bits: a cache that is half or a quarter as large, and less to read for every token.

    key_0: [B, H, capacity, D]                      key_0: [B, H, capacity, D] of int8
                                                    key_0_scale: [B, H, capacity, 1]
    k = index_copy_(key_0, 2, rows, new)  becomes   c = index_copy_(key_0, 2, rows, round(new / scale))
                                                    s = index_copy_(key_0_scale, 2, rows, scale)
    k[:, :, :N]                                     c[:, :, :N] * s[:, :, :N]

A row is rounded once, when it is written; what attention reads is widened where it is read, in decode
inside the loop that sums it. The formats are in ``fxopt/kv_formats.py``. This is the one pass that
changes what the model says: docs/quantize-kv.md has by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.attention import MATMULS, Attention, RowWrite, consumers
from fxopt.errors import InvalidRequestError
from fxopt.kv_formats import FORMATS, FormatName, KVFormat
from fxopt.lengths import ROWS
from fxopt.program import CACHE_POSITION, Facts, Program, Rows
from fxopt.rewrite import Pass
from fxopt.views import Miss, arguments, shape, swap_argument
from fxopt.written import Written

aten = torch.ops.aten


@dataclass(frozen=True)
class PlainRows:
    """The K or the V of one layer, kept as the model computes it."""

    write: RowWrite
    rows: Rows
    layer: int
    is_key: bool

    @property
    def node(self) -> Node:
        return self.write.node

    @property
    def windows(self) -> list[Node]:
        """The slices of rows that are read of the buffer; what else reads it reads all of it."""
        slices = [user for user in self.node.users if user.target is aten.slice.Tensor]
        return [one for one in slices if arguments(one)["dim"] == ROWS]


@dataclass(frozen=True)
class QuantizeKV(Pass[PlainRows]):
    name = "quantize_kv"
    summary = "keeps K and V in 8 or 4 bits, with scales beside them"
    by_default: ClassVar[bool] = False

    kv_dtype: FormatName = "int8"

    def __post_init__(self) -> None:
        if self.kv_dtype not in FORMATS:
            raise InvalidRequestError(f"kv_dtype={self.kv_dtype!r} is no format; there are {', '.join(FORMATS)}")

    def expected(self, program: Program) -> int:
        return 2 * len(program.facts.layers)

    def find(self, program: Program) -> Iterator[PlainRows | Miss]:
        inputs = program.placeholders()
        for layer in range(len(program.facts.layers)):
            for is_key, rows in zip((True, False), program.facts.rows(layer), strict=True):
                if rows.format is not None:  # done before
                    continue
                write = RowWrite.into(inputs[rows.name])
                if write is None:
                    yield Miss(inputs[rows.name], "no index_copy_ writes rows into it")
                else:
                    yield PlainRows(write, rows, layer, is_key)

    def refuse(self, program: Program, site: PlainRows) -> str | None:
        buffer = site.write.buffer
        if others := [user for user in buffer.users if user is not site.node and user.target is not aten.sym_size.int]:
            return f"{buffer} is also read by {', '.join(map(str, others))}, which would find codes there"
        why = self._format(site).obstacle(site.rows.dim)
        return None if why is None else f"{buffer} cannot be kept as {self.kv_dtype}: {why}"

    def rewrite(self, program: Program, site: PlainRows) -> None:
        graph, run = program.graph, Written(program)
        rows = replace(site.rows, format=self._format(site))
        turn = Turn.of(site) if self._format(site).turns else None
        program.facts = self._noted(program.facts, site)
        buffers = _inputs(program, site.write.buffer, rows)
        position = program.placeholders()[CACHE_POSITION]
        with graph.inserting_before(site.node):
            parts = zip(buffers, rows.encode(site.write.new, run), strict=True)
            writes = [run(aten.index_copy_.default, buffer, ROWS, position, part) for buffer, part in parts]
        for window in site.windows:
            with graph.inserting_before(window):
                seen = [run(aten.slice.Tensor, write, *window.args[1:]) for write in writes]
                window.replace_all_uses_with(rows.decode(seen, run, turned_back=turn is None))
            graph.erase_node(window)
        if site.node.users:
            with graph.inserting_before(site.node):
                site.node.replace_all_uses_with(rows.decode(writes, run, turned_back=turn is None))
        graph.erase_node(site.node)
        if turn is not None:
            turn.write(program, rows, run)

    def _format(self, site: PlainRows) -> KVFormat:
        return FORMATS[self.kv_dtype][0 if site.is_key else 1]

    def _noted(self, facts: Facts, site: PlainRows) -> Facts:
        """The same with the format of this K or V."""
        layers = list(facts.layers)
        one = layers[site.layer]
        of_key = replace(one, key_format=self.kv_dtype)
        layers[site.layer] = of_key if site.is_key else replace(one, value_format=self.kv_dtype)
        return replace(facts, layers=tuple(layers))


@dataclass(frozen=True)
class Turn:
    """Where rows that are kept turned are made up for: not in all of the window, but in what meets it.

    A query that is turned has the same products with turned keys, and a sum of turned values is turned as a whole.
    """

    reader: Node  # the one op that computes with the rows
    query: Node | None  # that meets the keys; None: the rows are values, and the result is turned

    @classmethod
    def of(cls, site: PlainRows) -> Turn | None:
        found = consumers(site.node)
        if len(found) != 1:
            return None
        [(reader, operand)] = found
        query, read = _operands(reader, site.is_key)
        met = query if site.is_key else reader
        if read is not operand or shape(met)[-1] != site.rows.dim:
            return None
        return cls(reader, query if site.is_key else None)

    def write(self, program: Program, rows: Rows, run: Written) -> None:
        graph = program.graph
        if self.query is not None:
            with graph.inserting_before(self.reader):
                swap_argument(self.reader, self.query, rows.turned(self.query, run))
            return
        users = list(self.reader.users)
        with graph.inserting_before(self.reader.next):
            result = rows.turned(self.reader, run)
        for user in users:
            swap_argument(user, self.reader, result)


def _operands(reader: Node, is_key: bool) -> tuple[Any, Any]:
    """What attention, or a product of it, reads on the left, and on the right from the cache."""
    attention = Attention.of(reader)
    if attention is not None:
        return attention.query, attention.key if is_key else attention.value
    first = MATMULS.get(reader.target)
    return (None, None) if first is None else (reader.args[first], reader.args[first + 1])


def _inputs(program: Program, codes: Node, rows: Rows) -> list[Node]:
    """The graph's inputs for what a row is spread over: the one that is there, now of codes, and new ones behind it."""
    batch, capacity = codes.meta["val"].shape[0], program.facts.capacity
    found: list[Node] = []
    for buffer in rows.buffers:
        with program.fake_mode:
            example = torch.empty(buffer.shape(batch, capacity), dtype=buffer.dtype, device=program.facts.device)
        if not found:
            codes.meta["val"] = example
            found.append(codes)
        else:
            found.append(program.add_input(buffer.name, example, after=found[-1]))
    return found
