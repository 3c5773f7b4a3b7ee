"""A memory plan as plain data and as YAML, and back: checked to the last field, because people edit it.

    ActivationDAG: …          what the graph says; not read here
    MemoryPlan:
      version: 1
      alignment: 64
      merge: tables
      mode: inference
      sets:
      - shapes: {ids: [1, 512]}
        lower_bound: 27319296
        arena: 27319296
        status: optimal
        offsets: {mm_3: 0}
      buffers: {mm_3: {life: [41, 44], bytes: 512*b*s, kind: activation}}
      order: [[mm_3, add_5]]

``bytes`` is a number, a list with one number for each set, or an expression of the ``symbols`` that each set gives.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

from fxopt.memory.errors import PlanError
from fxopt.memory.order import Order, order_from
from fxopt.memory.planner import Plan, Status
from fxopt.memory.problem import ALIGN, MOST_BYTES, Problem
from fxopt.memory.schema import flag, listed, named, one_of, table, text, whole, wrong
from fxopt.memory.sets import MemoryPlan, Merge, Mode
from fxopt.memory.sizes import read_size
from fxopt.memory.symbolic import SymbolicBuffer, SymbolicProblem

VERSION = 1
BLOCK, GRAPH = "MemoryPlan", "ActivationDAG"
MOST_BUFFERS, MOST_SETS, MOST_INPUTS, MOST_DIMENSIONS = 2**20, 2**12, 2**12, 64
LATEST = 2**40  # the last step of a lifetime


def to_dict(made: MemoryPlan) -> dict[str, Any]:
    """The plan as plain data, under its name; what the graph says may be put beside it."""
    buffers = made.plans[0].problem.buffers
    common = Counter(buffer.align for buffer in buffers).most_common(1)
    alignment = common[0][0] if common else ALIGN
    block: dict[str, Any] = {"version": VERSION, "alignment": alignment, "merge": made.merge, "mode": made.mode}
    block["sets"] = [_written_set(made, number) for number in range(len(made.plans))]
    block["buffers"] = {b.name: _written_buffer(made, number, alignment) for number, b in enumerate(buffers)}
    if made.order is not None:
        block["order"] = [list(pair) for pair in sorted(made.order.pairs)]
    return {BLOCK: block}


def from_dict(document: object) -> MemoryPlan:
    """The plan that plain data describes, or a sentence that says where it is wrong."""
    everything = table(document, "the document", {BLOCK}, {GRAPH})
    needed = {"version", "alignment", "merge", "mode", "sets", "buffers"}
    block = table(everything[BLOCK], BLOCK, needed, {"order"})
    if (version := whole(block["version"], "version", 0, 10**6)) != VERSION:
        raise PlanError(f"{BLOCK} has version {version}, and this fxopt reads {VERSION}; plan again")
    merge: Merge = one_of(get_args(Merge), block["merge"], "merge")
    mode: Mode = one_of(get_args(Mode), block["mode"], "mode")
    sets = [_set(item, f"sets[{place}]") for place, item in enumerate(listed(block["sets"], "sets", 1, MOST_SETS))]
    symbolic, problems = _problems(block, sets)
    order = _order(block, merge, problems[0])
    plans = tuple(_plan(each, problem, order) for each, problem in zip(sets, problems, strict=True))
    if merge == "max" and len({tuple(sorted(each.offsets.items())) for each in plans}) > 1:
        raise PlanError('the sets have different offsets, and merge is "max", which has one table; write "tables"')
    shapes = tuple(each.get("shapes", {}) for each in sets) if any("shapes" in each for each in sets) else ()
    values = tuple(each.get("symbols", {}) for each in sets) if symbolic else ()
    return MemoryPlan(merge, plans, order, shapes, mode, symbolic, values)


def _written_set(made: MemoryPlan, number: int) -> dict[str, Any]:
    plan = made.plans[number]
    data: dict[str, Any] = {}
    if made.shapes:
        data["shapes"] = {name: list(sizes) for name, sizes in made.shapes[number].items()}
    if made.values:
        data["symbols"] = dict(made.values[number])
    data |= {"lower_bound": plan.lower_bound, "arena": plan.size, "status": plan.status}
    if plan.proven > plan.lower_bound:
        data["proven"] = plan.proven
    return data | {"offsets": dict(plan.offsets)}


def _written_buffer(made: MemoryPlan, number: int, alignment: int) -> dict[str, Any]:
    buffer = made.plans[0].problem.buffers[number]
    sizes = [plan.problem.buffers[number].nbytes for plan in made.plans]
    nbytes: Any = sizes[0] if len(set(sizes)) == 1 else sizes
    if made.symbolic is not None:
        nbytes = str(made.symbolic.buffers[number].nbytes)
    data = {"life": [buffer.start, buffer.end], "bytes": nbytes, "kind": buffer.kind}
    if buffer.align != alignment:
        data["align"] = buffer.align
    return data if buffer.padded else {**data, "padded": False}


def _set(data: object, where: str) -> dict[str, Any]:
    """One of the sets, each of its values in bounds; what it says of its quality is found out again."""
    found = table(data, where, {"lower_bound", "arena", "status", "offsets"}, {"shapes", "symbols", "proven"})
    for key in ("lower_bound", "arena", "proven"):
        whole(found.get(key, 0), f"{where}: {key}", 0, MOST_BYTES)
    one_of(get_args(Status), found["status"], f"{where}: status")
    for name, offset in named(found["offsets"], f"{where}: offsets", MOST_BUFFERS).items():
        whole(offset, f"{where}: the offset of {name}", 0, MOST_BYTES)
    for name, sizes in named(found.get("shapes", {}), f"{where}: shapes", MOST_INPUTS).items():
        for size in listed(sizes, f"{where}: the shape of {name}", 0, MOST_DIMENSIONS):
            whole(size, f"{where}: the shape of {name}", 0, MOST_BYTES)
    for name, value in named(found.get("symbols", {}), f"{where}: symbols", MOST_INPUTS).items():
        whole(value, f"{where}: the symbol {name}", 0, MOST_BYTES)
    return found


def _problems(block: dict[str, Any], sets: list[dict[str, Any]]) -> tuple[SymbolicProblem | None, list[Problem]]:
    """The problem of each set."""
    alignment = whole(block["alignment"], "alignment", 1, MOST_BYTES)
    rows = named(block["buffers"], "buffers", MOST_BUFFERS)
    buffers = [_buffer(name, data, alignment) for name, data in rows.items()]
    if any(isinstance(data["bytes"], str) for data in rows.values()):
        sized = (replace(buffer, nbytes=_expression(buffer.name, rows[buffer.name]["bytes"])) for buffer in buffers)
        symbolic = SymbolicProblem(tuple(sized))
        return symbolic, [symbolic.at(each.get("symbols", {})) for each in sets]
    columns = [_numbers(name, data["bytes"], len(sets)) for name, data in rows.items()]
    return None, [
        Problem(buffer.sized(column[place]) for buffer, column in zip(buffers, columns, strict=True))
        for place in range(len(sets))
    ]


def _buffer(name: str, data: object, alignment: int) -> SymbolicBuffer:
    """A buffer whose bytes are not read yet."""
    found = table(data, f"buffer {name}", {"life", "bytes"}, {"kind", "align", "padded"})
    life = listed(found["life"], f"the life of {name}", 2, 2)
    start, end = (whole(step, f"the life of {name}", 0, LATEST) for step in life)
    align = whole(found.get("align", alignment), f"the alignment of {name}", 1, MOST_BYTES)
    kind = text(found.get("kind", "activation"), f"the kind of {name}")
    return SymbolicBuffer(name, start, end, 0, align, kind, flag(found.get("padded", True), f"{name}: padded"))


def _expression(name: str, data: object) -> Any:
    if isinstance(data, str):
        return read_size(data)
    return whole(data, f"the bytes of {name}, in a plan with expressions,", 0, MOST_BYTES)


def _numbers(name: str, data: object, sets: int) -> list[int]:
    where = f"the bytes of {name}"
    sizes = listed(data, where, sets, sets) if isinstance(data, list) else [data] * sets
    return [whole(size, where, 0, MOST_BYTES) for size in sizes]


def _order(block: dict[str, Any], merge: Merge, problem: Problem) -> Order | None:
    if ("order" in block) != (merge == "order"):
        raise PlanError(
            f'merge is "{merge}", and an order is {"" if "order" in block else "not "}given; change one of them'
        )
    if merge != "order":
        return None
    pairs = []
    for item in listed(block["order"], "order", 0, MOST_BUFFERS):
        low, high = (text(name, "a name in order") for name in listed(item, "a pair in order", 2, 2))
        pairs.append((low, high))
    return order_from(pairs, problem.buffers)


def _plan(data: dict[str, Any], problem: Problem, order: Order | None) -> Plan:
    proven = data.get("proven", problem.lower_bound)
    plan = Plan(problem, data["offsets"], data["arena"], max(proven, problem.lower_bound), "read")
    plan.verify()
    if plan.proven > plan.size:
        wrong("proven", f"at most the {plan.size:,} bytes of the arena", proven)
    if order is not None:
        for name, offset in order.plan(problem).offsets.items():
            if plan.offsets[name] != offset:
                raise PlanError(f"{name} lies at {plan.offsets[name]:,}, and by the order it lies at {offset:,}")
    return plan
