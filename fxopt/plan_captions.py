"""What is said of the places of an arena: who makes what lies there, in which layer and line of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch.fx import GraphModule, Node

from fxopt.liveness import Liveness, Storage
from fxopt.memory import Plan, Problem
from fxopt.memory.picture import OTHER
from fxopt.origin import layer_of, source_of

MOST_LINES = 6  # of a place that many results take in turn
MOST_KINDS = 5  # that have a colour of their own


def captions(gm: GraphModule, live: Liveness) -> dict[str, str]:
    """By place, a line for every tensor that is put there."""
    nodes = {node.name: node for node in gm.graph.nodes}
    found = {}
    for slot, held in live.placed.items():
        lines = [_tensor(live, storage, nodes[storage.node]) for storage in held[:MOST_LINES]]
        if more := len(held) - len(lines):
            lines.append(f"and {more} more that are computed in place")
        found[slot] = "\n".join(lines)
    return found


def by_operator(gm: GraphModule, plan: Plan) -> Plan:
    """The plan with buffers of the kind of the operator that makes them; those with few bytes are all of one kind."""
    operators = {node.name: str(node.target).split(".")[-2:][0] for node in gm.graph.nodes}
    made = {buffer.name: operators[buffer.name.partition(".")[0]] for buffer in plan.problem.buffers}
    taken: Counter[str] = Counter()
    for buffer in plan.problem.buffers:
        taken[made[buffer.name]] += buffer.size * buffer.duration
    shown = {kind for kind, _ in taken.most_common(MOST_KINDS)}
    painted = (replace(b, kind=made[b.name] if made[b.name] in shown else OTHER) for b in plan.problem.buffers)
    return replace(plan, problem=Problem(painted))


def _tensor(live: Liveness, storage: Storage, node: Node) -> str:
    layouts = [leaf.layout for leaf in live.leaves[node.name] if leaf is not None and leaf.storage == storage.name]
    shape = f"{list(layouts[0].sizes)} {str(layouts[0].dtype).removeprefix('torch.')}" if layouts else storage.kind
    layer = layer_of(node)
    where = "outside of the layers" if layer is None else f"layer {layer}"
    return f"{storage.name} {shape}: {node.target}, {where}, {source_of(node)}"
