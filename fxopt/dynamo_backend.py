"""``torch.compile(model, backend="fxopt")``: the passes that need no cache, then Inductor.

Dynamo hands over a graph; it is rewritten and goes to Inductor. Where nothing can be gained, where
gradients may be asked for, and where anything at all fails, Inductor gets the graph as it came.
``last_reports()`` says which it was; the logger "fxopt" says it line by line.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend, register_backend
from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxopt.admission import Selection, select
from fxopt.driver import apply
from fxopt.dynamo_graph import BODIES, LeftAlone, as_program, lifted
from fxopt.errors import InvalidRequestError, RewriteError, first_line
from fxopt.listing import listing
from fxopt.outcome import Outcome
from fxopt.passes import PASSES
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.program import Program
from fxopt.provenance import trace
from fxopt.report_text import size
from fxopt.rewrite import Pass, Stage
from fxopt.seats import SeatedCode
from fxopt.uncached import UNCACHED, uncached

log = logging.getLogger("fxopt")

NAME = "fxopt"
MOST_REPORTS = 100

Run = Callable[..., Any]


@dataclass
class GraphReport:
    """What was done to one graph of Dynamo's: an outcome for each pass, or why it was left as it came."""

    number: int
    outcomes: list[Outcome] = field(default_factory=list)
    left_alone: str | None = None
    packed_bytes: int = 0

    def __getitem__(self, name: str) -> Outcome:
        return {outcome.name: outcome for outcome in self.outcomes}[name]

    def lines(self) -> list[str]:
        """A line for each pass, and one for what became of the graph."""
        lines = [_line(outcome) for outcome in self.outcomes]
        if self.packed_bytes:
            lines.append(f"packed weights: {size(self.packed_bytes)}B, no second copy")
        if self.left_alone is not None:
            lines.append(f"compiled as it came: {self.left_alone}")
        return lines

    def __str__(self) -> str:
        return "\n".join([f"graph {self.number}", *(f"  {line}" for line in self.lines())])


_reports: deque[GraphReport] = deque(maxlen=MOST_REPORTS)
_numbers = itertools.count()


def last_reports() -> list[GraphReport]:
    """What was done to the graphs compiled so far, the latest last."""
    return list(_reports)


@dataclass(frozen=True)
class Compiler:
    """The backend behind this one, by its name in PyTorch, with settings if it is Inductor."""

    name: str = "inductor"
    settings: tuple[tuple[str, Any], ...] = ()

    def __call__(self, module: GraphModule, examples: Sequence[Any]) -> Run:
        settings = {"config_patches": dict(self.settings)} if self.settings else {}
        compiled: Run = lookup_backend(self.name)(module, list(examples), **settings)
        return compiled


def backend(
    module: GraphModule,
    examples: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """What ``torch.compile(model, backend="fxopt", mode=..., options={...})`` calls for each graph.

    ``options["passes"]`` selects passes as ``fxopt.optimize`` does, ``options["backend"]`` names the
    compiler behind them; ``mode`` and all other options are Inductor's.
    """
    passes, compiler = _asked(mode, options)
    report = GraphReport(next(_numbers))
    run: Run | None = None
    try:
        run = _rewritten(module, examples, passes, compiler, report)
    except RestartAnalysis:  # no failure: Dynamo is to trace once more with what was learnt
        raise
    except LeftAlone as verdict:
        report.left_alone = str(verdict)
    except Exception as error:
        report.left_alone = f"{type(error).__name__}: {first_line(error)}"
        log.warning("graph %d goes to %s as it came, %s", report.number, compiler.name, report.left_alone)
    _reports.append(report)
    for line in report.lines():
        log.info("graph %d: %s", report.number, line)
    return compiler(module, examples) if run is None else run


def _rewritten(
    module: GraphModule, examples: Sequence[Any], passes: Sequence[Pass[Any]], compiler: Compiler, report: GraphReport
) -> Run:
    program = _applied(passes, as_program(module, examples, compiler.name), report)
    if not any(map(_is_gain, report.outcomes)):
        raise LeftAlone("the passes found nothing that the compiler would not do itself")
    piece = lifted(program, module, examples)
    compiled = compiler(piece.module, piece.examples)
    report.packed_bytes = piece.packed_bytes
    if not piece.groups:
        return compiled
    # Compiled when it is first needed, by Dynamo once more: sizes may have changed since this graph was made.
    untouched: Run = torch.compile(module, backend=compiler)
    return SeatedCode(compiled, untouched, piece.groups)


def _applied(passes: Sequence[Pass[Any]], program: Program, report: GraphReport) -> Program:
    """Every pass in turn. Nobody compares results here, but what goes in and comes out must stay alike."""
    for rewriter in passes:
        try:
            result, outcome = apply(rewriter, program)
        except Exception as error:
            raise RewriteError(f"{rewriter.name} failed with {type(error).__name__}: {first_line(error)}") from error
        if result.placeholders().keys() != program.placeholders().keys():
            raise RewriteError(f"{rewriter.name} changed the inputs of the graph")
        if _results(result) != _results(program):
            raise RewriteError(f"{rewriter.name} changed dtypes, shapes or strides of what the graph hands out")
        outcome.expected = None  # nobody knows a structure of the model that could say
        report.outcomes.append(outcome)
        program = result
        trace(rewriter.name, partial(_text, program))
    return program


def _text(program: Program) -> str:
    return "\n".join(line.text for line in listing(program))


def _results(program: Program) -> list[str]:
    """What each result looks like."""
    values = torch.fx.map_arg(program.output().args, lambda node: node.meta.get("val"))
    return [_looks(value) for value in tree_leaves(values)]


def _looks(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"


def _is_gain(outcome: Outcome) -> bool:
    """Whether a pass did more than take out what compilers take out themselves."""
    if outcome.name == RemoveControlFlow.name:
        return not BODIES.isdisjoint(outcome.ops)
    return outcome.changed_something


def _line(outcome: Outcome) -> str:
    if outcome.dropped is not None:
        return f"{outcome.name}: {outcome.dropped}"
    left = [*outcome.refused, *outcome.near]
    reasons = f", {len(left)} left alone: {left[0].reason}" if left else ""
    return f"{outcome.name}: {outcome.matched} rewritten, {outcome.nodes_before} → {outcome.nodes_after} nodes{reasons}"


def _asked(mode: str | None, options: Mapping[str, Any] | None) -> tuple[tuple[Pass[Any], ...], Compiler]:
    settings = dict(options or {})
    passes = selected(settings.pop("passes", None))
    name = settings.pop("backend", "inductor")
    if name == NAME:
        raise InvalidRequestError('options={"backend": "fxopt"} goes in a circle; name the compiler behind the passes')
    if name != "inductor":
        if mode is not None or settings:
            given = ", ".join(["mode"] * (mode is not None) + list(settings))
            raise InvalidRequestError(f"{given} cannot be set for {name}: only Inductor has modes and further options")
        return passes, Compiler(name)
    known = torch._inductor.list_options()
    for option in settings:
        if option.replace("-", "_") not in known:
            near = difflib.get_close_matches(option, ["passes", "backend", *known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequestError(f"there is no option {option!r}, neither of fxopt nor of Inductor{hint}")
    modes = torch._inductor.list_mode_options(mode) if mode is not None else {}
    return passes, Compiler(settings=tuple({**modes, **settings}.items()))


def selected(passes: Selection) -> tuple[Pass[Any], ...]:
    """The passes for graphs without a cache, from any form that ``fxopt.optimize`` takes as well.

    By default they are the built-in ones that need no cache. Others must be asked for by name: nothing
    here compares results with the stock model's.
    """
    off: set[str] = set()
    named: set[str] = set()
    if isinstance(passes, Mapping):
        off = {name for name, wanted in passes.items() if wanted is False}
        named = set(passes) - off
        passes = {name: name in off or wanted for name, wanted in passes.items()}  # all of them can be left out
    elif isinstance(passes, Iterable) and not isinstance(passes, str):
        passes = tuple(passes)
        named = {item if isinstance(item, str) else item.name for item in passes}
    chosen = [rewriter for rewriter in select(passes) if rewriter.name not in off]
    fitting = (_applicable(rewriter, rewriter.name in named) for rewriter in chosen)
    return tuple(rewriter for rewriter in fitting if rewriter is not None)


def _applicable(rewriter: Pass[Any], is_named: bool) -> Pass[Any] | None:
    """A pass as it is applied here; None when it does not belong here and nobody asked for it."""
    if (fitting := uncached(rewriter)) is not None or not is_named:
        return fitting
    if rewriter.stage is Stage.SYMBOLIC and rewriter.name not in {kind.name for kind in PASSES}:
        return rewriter
    raise InvalidRequestError(
        f"{rewriter.name} is for graphs that fxopt.optimize makes, so torch.compile cannot apply it; "
        f"these it can: {', '.join(kind.name for kind in UNCACHED)}"
    )


def _make_known() -> None:
    """PyTorch finds the backends of installed packages itself; a checkout that is only imported it does not."""
    if not entry_points(group="torch_dynamo_backends", name=NAME):
        with contextlib.suppress(AssertionError):  # the name is known: this module was loaded before
            register_backend(backend, name=NAME)


_make_known()
