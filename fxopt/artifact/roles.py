"""A graph that was compiled, as the manifest has it, and whether it fits the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxopt.artifact.graph_read import Draft
from fxopt.artifact.plain import wrong
from fxopt.artifact.sources import Source
from fxopt.chain import Plan
from fxopt.in_place import InPlaceProof
from fxopt.program import ATTENTION_MASK, Facts
from fxopt.specialise import Role


@dataclass(frozen=True)
class SavedRole:
    """A graph that was compiled: where its files lie, and how its pieces are called."""

    folder: str
    role: Role
    plan: Plan
    windowed: bool
    pieces: int  # packages of compiled code; 0: the graph is compiled when it is loaded
    proof: InPlaceProof | None
    launches: int | None


def check_fits(draft: Draft, facts: Facts, sources: Mapping[str, Source], where: str) -> None:
    """The graph reads weights that there are, and buffers as the cache makes them."""
    if strange := [name for name in draft.weights if name not in sources]:
        wrong(where, "a graph that reads known weights", strange[0])
    inputs = {node.name: one for node, one in draft.inputs.items()}
    for name, one in inputs.items():
        if one.stride not in (None, (facts.capacity, 1)) or (one.stride is not None and name != ATTENTION_MASK):
            wrong(f"{where}: {name}", "an input as the cache makes it", one.stride)
    for buffer in facts.buffers():
        found, wanted = inputs.get(buffer.name), buffer.shape(1, facts.capacity)
        if found is None or found.shape[1:] != wanted[1:] or found.dtype != buffer.dtype:
            wrong(f"{where}: {buffer.name}", f"a buffer of {list(wanted[1:])}", found.shape if found else None)


def check_plan(one: SavedRole, draft: Draft, sources: Mapping[str, Source]) -> None:
    """Every value that a piece reads has been made by then, and no piece is called that there is not."""
    plan, where = one.plan, f"manifest.json: the plan of {one.folder}"
    if plan.inputs != tuple(node.name for node in draft.inputs) or not set(plan.weights) <= sources.keys():
        wrong(where, "a plan for its graph", plan.inputs)
    made = set(range(plan.given))
    for step in plan.steps:
        if not made.issuperset(step.reads) or not made.isdisjoint(step.writes) or step.piece < 0:
            wrong(where, "steps that read what was made before", step)
        if one.pieces and step.piece >= one.pieces:
            wrong(where, f"made of {one.pieces} pieces", step)
        made |= set(step.writes)
        made -= set(step.frees)
    if not plan.results or not made.issuperset(plan.results) or max(made) >= plan.size:
        wrong(where, "a plan with results", plan.results)
