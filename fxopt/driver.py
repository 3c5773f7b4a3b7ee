"""The driver: everything about applying a pass that no pass should repeat."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Node

from fxopt.errors import RewriteError
from fxopt.origin import layer_of, source_of
from fxopt.outcome import Outcome, Spot
from fxopt.program import Program
from fxopt.propagate import propagate, snapshot
from fxopt.provenance import SWITCH, is_switched_off, observed
from fxopt.rewrite import Pass, Refused
from fxopt.views import Miss, mutates


def apply(rewriter: Pass[Any], program: Program) -> tuple[Program, Outcome]:
    """Apply one pass to a copy of ``program``; the program given is never changed."""
    draft = program.copy()
    nodes = len(draft.graph.nodes)
    outcome = Outcome(rewriter.name, rewriter.stage.value, rewriter.summary, nodes_before=nodes, nodes_after=nodes)
    with _timed(outcome):
        outcome.expected = rewriter.expected(draft)
        if is_switched_off(rewriter.name):
            outcome.dropped = f"switched off by {SWITCH}"
            return program, outcome
        known, ops, weight_bytes = snapshot(draft), op_counts(draft), _weight_bytes(draft)
        with observed(draft.gm, rewriter.name):
            if not _edited(rewriter, draft, outcome):
                return program, outcome
            remove_dead_code(draft)
        propagate(draft, known)
        draft.graph.lint()
        result = draft.trimmed()
        outcome.nodes_after = len(result.graph.nodes)
        outcome.ops = _change(ops, op_counts(result))
        outcome.freed_bytes = weight_bytes - _weight_bytes(result)
    return result, outcome


@contextmanager
def _timed(outcome: Outcome) -> Iterator[None]:
    started = time.perf_counter()
    yield
    outcome.seconds = time.perf_counter() - started


def _edited(rewriter: Pass[Any], draft: Program, outcome: Outcome) -> bool:
    """Rewrite every place that may be; False when the draft is to be thrown away."""
    try:
        for found in list(rewriter.find(draft)):
            if isinstance(found, Miss):
                outcome.near.append(_spot(found.node, found.reason))
            elif (reason := rewriter.refuse(draft, found)) is not None:
                outcome.refused.append(_spot(found.node, reason))
            else:
                outcome.sites.append(_spot(found.node))
                with _stamping(draft, rewriter.name, origin=found.node):
                    rewriter.rewrite(draft, found)
                outcome.matched += 1
        if rewriter.required and not outcome.is_complete:
            return False  # half of a rewrite that is needed in full is of no use
        with _stamping(draft, rewriter.name):
            rewriter.finish(draft, outcome.matched)
    except Refused as verdict:
        outcome.matched, outcome.sites = 0, []
        outcome.refused.append(_spot(verdict.node, verdict.reason))
        return False
    return True


def require(rewriter: Pass[Any], outcome: Outcome) -> None:
    """A pass that the runtime stands on must have matched everything it expected."""
    if not rewriter.required or (outcome.is_complete and outcome.dropped is None):
        return
    left = [f"{spot.node} ({spot.source}): {spot.reason}" for spot in (*outcome.refused, *outcome.near)[:3]]
    why = outcome.dropped or "; ".join(left) or "no reason was found"
    raise RewriteError(
        f"{rewriter.name} matched {outcome.matched} of {outcome.expected} places and is needed in full: {why}. "
        "Use the stock model, or report the architecture."
    )


def remove_dead_code(program: Program) -> None:
    """Drop nodes nobody reads, but never one that writes into a tensor, nor an input."""
    for node in reversed(list(program.graph.nodes)):
        effect = mutates(node) or node.is_impure()
        if not node.users and node.op in ("call_function", "get_attr") and not effect:
            program.graph.erase_node(node)


def op_counts(program: Program) -> Counter[str]:
    """How often each operator is called."""
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return Counter(
        str(target) if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))
        for target in calls
    )


def _change(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What came and what went, the largest change first."""
    change = {op: after[op] - before[op] for op in before.keys() | after.keys() if after[op] != before[op]}
    return dict(sorted(change.items(), key=lambda item: (-abs(item[1]), item[0])))


def _spot(node: Node, reason: str = "") -> Spot:
    return Spot(node.name, source_of(node), layer_of(node), reason)


@contextmanager
def _stamping(program: Program, name: str, origin: Node | None = None) -> Iterator[None]:
    """Note on every node made meanwhile which pass made it and which model code it stands for."""
    made: list[Node] = []
    code = {key: origin.meta[key] for key in ("stack_trace", "nn_module_stack") if origin and key in origin.meta}
    program.gm._register_create_node_hook(made.append)
    try:
        yield
    finally:
        program.gm._unregister_create_node_hook(made.append)
    for node in made:
        node.meta["fxopt"] = (*node.meta.get("fxopt", ()), name)
        for key, value in code.items():
            node.meta.setdefault(key, value)


def _weight_bytes(program: Program) -> int:
    """Memory of the weights that a graph reads, each storage once; fake ones have sizes too."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for _, tensor in program.weights()}
    return sum(storages.values())
