"""``activation_dag.yaml``: what every op of a graph does with memory, and the plan for it.

    ActivationDAG:
      ActivationOperator:
        mul_7:
          topological_order: 41
          input: {linear_3: {alloc_bytes: 131072, dtype: fp32, shape: [1, 128, 256], semantic_alias: linear_3}}
          output: {mul_7: {alloc_bytes: 131072, dtype: fp32, shape: [1, 128, 256], semantic_alias: mul_7}}
      InplaceAliasHolder: {linear_3_inplace: {linear_3: null, mul_7: null}}
    MemoryPlan: …

Weights, inputs and their views are left out. ``semantic_alias`` names the memory that a tensor lies in, and
``alloc_bytes`` are the bytes of all of that, at the largest of the planned shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxopt.activation_plan import ActivationPlan, lifetimes
from fxopt.in_place_slots import in_all
from fxopt.liveness import Liveness
from fxopt.memory import MemoryPlan, PlanError, from_dict, read_yaml, to_dict, write_yaml
from fxopt.memory.problem import MOST_BYTES
from fxopt.memory.schema import listed, named, table, text, whole, wrong
from fxopt.program import Program
from fxopt.shape_sets import Axes, examples

FILE = "activation_dag.yaml"
GRAPH, OPERATORS, HOLDERS = "ActivationDAG", "ActivationOperator", "InplaceAliasHolder"
IN_PLACE = "_inplace"
LONGEST_FILE = 2**26  # bytes
MOST_OPERATORS, MOST_TENSORS, MOST_DIMENSIONS = 2**20, 2**12, 64

#: What Intel's files call dtypes; the others go by PyTorch's names.
_SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "s64",
    torch.int32: "s32",
    torch.int16: "s16",
    torch.int8: "s8",
    torch.uint8: "u8",
}
_DTYPES = {
    dtype: _SHORT.get(dtype, str(dtype).removeprefix("torch."))
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that an op reads or makes."""

    alloc_bytes: int
    dtype: str
    shape: tuple[int, ...]
    semantic_alias: str


@dataclass(frozen=True)
class OperatorRecord:
    topological_order: int
    input: Mapping[str, TensorRecord]
    output: Mapping[str, TensorRecord]


@dataclass(frozen=True)
class ActivationDAG:
    """The ops by name, the tensors that take one place after another, and the plan."""

    operators: Mapping[str, OperatorRecord]
    in_place: Mapping[str, tuple[str, ...]]
    memory: MemoryPlan


def activation_dag(gm: GraphModule, plan: ActivationPlan) -> ActivationDAG:
    """What there is to say about a graph and its plan."""
    operators = {}
    for order, node in enumerate(node for node in gm.graph.nodes if node.op == "call_function"):
        read = dict(record for source in node.all_input_nodes for record in _records(source, plan))
        made = dict(_records(node, plan))
        if read or made:
            operators[node.name] = OperatorRecord(order, read, made)
    return ActivationDAG(operators, _holders(plan.lives[0]), plan.memory)


def dump(dag: ActivationDAG, path: str | Path = FILE) -> Path:
    """Write a file that :func:`load` reads."""
    Path(path).write_text(to_text(dag), encoding="utf-8")
    return Path(path)


def load(path: str | Path = FILE) -> ActivationDAG:
    """Read a file that anybody may have written; a PlanError says what is wrong with it."""
    with Path(path).open("rb") as file:
        content = file.read(LONGEST_FILE + 1)
    if len(content) > LONGEST_FILE:
        raise PlanError(f"{path} has more than {LONGEST_FILE:,} bytes, which are all that is read")
    try:
        return from_text(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is no text ({error.reason} at byte {error.start:,}); plan again") from None


def to_text(dag: ActivationDAG) -> str:
    operators = {
        name: {
            "topological_order": one.topological_order,
            "input": {tensor: _written(record) for tensor, record in one.input.items()},
            "output": {tensor: _written(record) for tensor, record in one.output.items()},
        }
        for name, one in dag.operators.items()
    }
    holders = {name: dict.fromkeys(tensors) for name, tensors in dag.in_place.items()}
    return write_yaml({GRAPH: {OPERATORS: operators, HOLDERS: holders}, **to_dict(dag.memory)})


def from_text(content: str) -> ActivationDAG:
    document = read_yaml(content)
    memory = from_dict(document)
    if GRAPH not in document:
        raise PlanError(f"the text has a plan and no {GRAPH}; read it with fxopt.memory.from_dict, or dump it again")
    graph = table(document[GRAPH], GRAPH, {OPERATORS, HOLDERS}, set())
    operators = {
        name: _operator(name, data) for name, data in named(graph[OPERATORS], OPERATORS, MOST_OPERATORS).items()
    }
    holders = {
        name: tuple(named(data, f"{HOLDERS}: {name}", MOST_TENSORS))
        for name, data in named(graph[HOLDERS], HOLDERS, MOST_OPERATORS).items()
    }
    dag = ActivationDAG(operators, holders, memory)
    _check_order(dag)
    _check_holders(dag)
    return dag


def restored(program: Program, dag: ActivationDAG, module: GraphModule | None = None) -> ActivationPlan:
    """The plan of a file for a graph, once it is sure that it was made for this one."""
    axes, gm = Axes(program), module or program.gm
    sets = [examples(program, axes.read(shapes), module) for shapes in dag.memory.shapes or [{}]]
    lives = in_all([lifetimes(gm, inputs, in_place=bool(dag.in_place)) for inputs in sets])
    if len(lives) != len(dag.memory.plans):
        raise PlanError(f"the plan has {len(dag.memory.plans)} sets, and shapes for {len(lives)}; plan again")
    for live, plan in zip(lives, dag.memory.plans, strict=True):
        wanted, found = ({b.name: b for b in problem.buffers} for problem in (live.problem, plan.problem))
        if odd := [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]:
            name = min(odd)
            raise PlanError(
                f"the plan was made for another graph: {name} is {wanted.get(name, 'not there')}, "
                f"and in the plan it is {found.get(name, 'not there')}; plan again"
            )
    if _holders(lives[0]) != dict(dag.in_place):
        raise PlanError(f"in this graph other results take the place of an operand than {HOLDERS} says; plan again")
    return ActivationPlan(dag.memory, tuple(lives), bool(dag.in_place))


def _records(node: Node, plan: ActivationPlan) -> Iterator[tuple[str, TensorRecord]]:
    """The tensors of a node by name, each as it is in the set where its memory is largest."""
    rows = [live.leaves.get(node.name, ()) for live in plan.lives]
    for place, leaves in enumerate(zip(*rows, strict=True)):
        found = [
            (live.storages[leaf.storage].nbytes, leaf)
            for live, leaf in zip(plan.lives, leaves, strict=True)
            if leaf is not None and leaf.storage is not None
        ]
        if not found:
            continue
        nbytes, leaf = max(found, key=lambda pair: pair[0])
        name = node.name if len(rows[0]) == 1 else f"{node.name}.{place}"
        yield name, TensorRecord(nbytes, _DTYPES[leaf.layout.dtype], leaf.layout.sizes, str(leaf.storage))


def _holders(live: Liveness) -> dict[str, tuple[str, ...]]:
    return {
        f"{slot}{IN_PLACE}": tuple(storage.name for storage in held)
        for slot, held in live.placed.items()
        if len(held) > 1
    }


def _written(record: TensorRecord) -> dict[str, Any]:
    return {**vars(record), "shape": list(record.shape)}


def _operator(name: str, data: object) -> OperatorRecord:
    found = table(data, name, {"topological_order", "input", "output"}, set())
    tensors = {
        side: {
            tensor: _tensor(f"{name}: {side} {tensor}", record)
            for tensor, record in named(found[side], f"{name}: {side}", MOST_TENSORS).items()
        }
        for side in ("input", "output")
    }
    order = whole(found["topological_order"], f"{name}: topological_order", 0, MOST_OPERATORS)
    return OperatorRecord(order, tensors["input"], tensors["output"])


def _tensor(where: str, data: object) -> TensorRecord:
    found = table(data, where, {"alloc_bytes", "dtype", "shape", "semantic_alias"}, set())
    sizes = listed(found["shape"], f"{where}: shape", 0, MOST_DIMENSIONS)
    if found["dtype"] not in _DTYPES.values():
        wrong(f"{where}: dtype", "one such as fp32, bf16 or s64", found["dtype"])
    return TensorRecord(
        whole(found["alloc_bytes"], f"{where}: alloc_bytes", 0, MOST_BYTES),
        found["dtype"],
        tuple(whole(size, f"{where}: a size", 0, MOST_BYTES) for size in sizes),
        text(found["semantic_alias"], f"{where}: semantic_alias"),
    )


def _check_order(dag: ActivationDAG) -> None:
    """Raise if an op reads what is made later or never, or two have the same turn."""
    made: set[str] = set()
    before = -1
    for name, one in sorted(dag.operators.items(), key=lambda item: item[1].topological_order):
        if one.topological_order == before:
            raise PlanError(f"{name} and another op both have topological_order {before}; each op has its own turn")
        before = one.topological_order
        if missing := [tensor for tensor in one.input if tensor not in made]:
            raise PlanError(f"{name} reads {missing[0]}, which no op before it makes; mend it, or plan again")
        made.update(one.output)
        for tensor, record in one.output.items():
            if record.semantic_alias not in made:
                raise PlanError(f"{tensor} lies in {record.semantic_alias}, which no op up to {name} makes")


def _check_holders(dag: ActivationDAG) -> None:
    """Raise unless every holder names tensors that are there, the first of which has a place."""
    made = {tensor for one in dag.operators.values() for tensor in one.output}
    placed = {buffer.name for buffer in dag.memory.plans[0].problem.buffers}
    for holder, tensors in dag.in_place.items():
        if missing := [tensor for tensor in tensors if tensor not in made]:
            raise PlanError(f"{holder} holds {missing[0]}, which no op makes; mend it, or plan again")
        first = holder.removesuffix(IN_PLACE)
        if not holder.endswith(IN_PLACE) or first not in tensors or first not in placed:
            raise PlanError(
                f"{HOLDERS} has {holder!r}; a holder is named after its first tensor, which has a place in the plan, "
                f"and ends in {IN_PLACE}"
            )
