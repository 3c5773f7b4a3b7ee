"""The driver: what a pass is, and everything about applying one that no pass should repeat."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch.fx import Node

from fxopt.errors import RewriteError
from fxopt.program import Program
from fxopt.propagate import propagate, snapshot
from fxopt.views import mutates


class Stage(Enum):
    """Which graph a pass rewrites."""

    SYMBOLIC = "symbolic"  # the one captured graph, any batch and any number of new tokens
    DECODE = "decode"  # the graph specialised to one new token


class Located(Protocol):
    """A place in the graph; ``node`` stands for it in reports."""

    @property
    def node(self) -> Node: ...


Site = TypeVar("Site", bound=Located)


class Refused(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a pass that finds half way that it must not go on; the driver drops its draft."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class Pass(Generic[Site]):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the pass's options.

    ``find`` yields the places, ``refuse`` says in a sentence why one must be left alone (or
    None), ``rewrite`` edits one, ``finish`` edits what only the whole graph can tell. Lint,
    dead code, shapes of new nodes, stamps, counts, timing and roll-back are the driver's.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    stage: ClassVar[Stage] = Stage.SYMBOLIC
    required: ClassVar[bool] = False

    def expected(self, program: Program) -> int | None:
        """How many sites the model's own structure says there are; None when it says nothing."""
        return None

    def find(self, program: Program) -> Iterator[Site]:
        raise NotImplementedError

    def refuse(self, program: Program, site: Site) -> str | None:
        return None

    def rewrite(self, program: Program, site: Site) -> None:
        raise NotImplementedError

    def finish(self, program: Program, matched: int) -> None:
        """Called once when every site is done."""


@dataclass(frozen=True)
class Refusal:
    """One place that a pass left alone, and why."""

    node: str
    source: str
    reason: str


@dataclass
class Outcome:
    """What one pass did: a row of the report."""

    name: str
    expected: int | None = None
    matched: int = 0
    refused: list[Refusal] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    dropped: str | None = None  # why the whole pass was taken out again


def apply(rewriter: Pass[Any], program: Program) -> tuple[Program, Outcome]:
    """Apply one pass to a copy of ``program``; the program given is never changed."""
    started = time.perf_counter()
    draft = program.copy()
    outcome = Outcome(rewriter.name, expected=rewriter.expected(draft), nodes_before=len(draft.graph.nodes))
    known = snapshot(draft)
    weights_before = _weight_bytes(draft)
    try:
        for site in list(rewriter.find(draft)):
            reason = rewriter.refuse(draft, site)
            if reason is not None:
                outcome.refused.append(_refusal(site.node, reason))
                continue
            _stamped(rewriter, draft, site)
            outcome.matched += 1
        if rewriter.required and outcome.matched < (outcome.expected or 0):
            return program, _unchanged(outcome, started)  # half of a rewrite that is needed in full is of no use
        before = set(draft.graph.nodes)
        rewriter.finish(draft, outcome.matched)
        _stamp(draft, before, rewriter.name, origin=None)
    except Refused as verdict:
        outcome.matched = 0
        outcome.refused.append(_refusal(verdict.node, verdict.reason))
        return program, _unchanged(outcome, started)
    remove_dead_code(draft)
    propagate(draft, known)
    draft.graph.lint()
    result = draft.copy()  # a fresh module keeps only the weights that its graph still reads
    outcome.nodes_after = len(result.graph.nodes)
    outcome.freed_bytes = weights_before - _weight_bytes(result)
    outcome.seconds = time.perf_counter() - started
    return result, outcome


def _unchanged(outcome: Outcome, started: float) -> Outcome:
    outcome.nodes_after = outcome.nodes_before
    outcome.seconds = time.perf_counter() - started
    return outcome


def require(rewriter: Pass[Any], outcome: Outcome) -> None:
    """A pass that the runtime stands on must have matched everything it expected."""
    if not rewriter.required or outcome.matched >= (outcome.expected or 0):
        return
    why = "; ".join(f"{r.node} ({r.source}): {r.reason}" for r in outcome.refused[:3]) or "no reason was found"
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


def source_of(node: Node) -> str:
    """``modeling_llama.py:284`` for a node, from the innermost frame of the model's own code."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    if not frames:
        return "?"
    path, line = next((f for f in reversed(frames) if "modeling_" in f[0]), frames[-1])
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def _refusal(node: Node, reason: str) -> Refusal:
    return Refusal(node.name, source_of(node), reason)


def _stamped(rewriter: Pass[Any], program: Program, site: Any) -> None:
    before = set(program.graph.nodes)
    origin = dict(site.node.meta)
    rewriter.rewrite(program, site)
    _stamp(program, before, rewriter.name, origin)


def _stamp(program: Program, before: set[Node], name: str, origin: dict[str, Any] | None) -> None:
    """Note on every new node which pass made it and which model code it stands for."""
    for node in program.graph.nodes:
        if node in before:
            continue
        node.meta["fxopt"] = (*node.meta.get("fxopt", ()), name)
        for key in ("stack_trace", "nn_module_stack"):
            if origin and key in origin:
                node.meta.setdefault(key, origin[key])


def _weight_bytes(program: Program) -> int:
    seen: dict[int, int] = {}
    for _, tensor in program.weights():
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def op_counts(program: Program) -> dict[str, int]:
    """How often each operator is called, most frequent first."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            operator = isinstance(node.target, torch._ops.OpOverload)
            name = str(node.target) if operator else str(getattr(node.target, "__name__", node.target))
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
