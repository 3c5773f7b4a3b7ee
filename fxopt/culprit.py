"""``bisect``: the smallest set of passes, and of places in them, that makes a check fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxopt.admission import Selection, admit, select
from fxopt.api import build
from fxopt.errors import InvalidRequestError, first_line
from fxopt.lower import Backend, Compile
from fxopt.only import Only
from fxopt.program import Program
from fxopt.progress import Progress
from fxopt.reproduction import Reproduction
from fxopt.request import Request
from fxopt.rewrite import Pass, Stage
from fxopt.smallest import smallest

log = logging.getLogger("fxopt")

#: True when an optimised model is good; an exception counts as bad.
Check = Callable[[Any], bool]


class NothingToFindError(InvalidRequestError):
    """The check passes with every pass applied."""


@dataclass(frozen=True)
class Culprit:
    """What a check fails with, and does not fail without."""

    passes: tuple[Pass[Any], ...]  # optional ones; none if those that the runtime needs are enough
    sites: dict[str, tuple[str, ...]]  # pass -> the places (layer and source line), where fewer than all are enough
    trials: int
    complaint: str  # what the check said
    reproduction: Reproduction = field(repr=False)

    def __str__(self) -> str:
        if not self.passes:
            return f"The check fails with the passes that cannot be left out ({self.trials} trials): {self.complaint}"
        lines = [f"The check fails with these and not without ({self.trials} trials): {self.complaint}"]
        for rewriter in self.passes:
            lines.append(f"  {rewriter.name}")
            lines += [f"    at {site}" for site in self.sites.get(rewriter.name, ())]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a script that shows the fault by itself."""
        Path(path).write_text(self.reproduction.script(), encoding="utf-8")


def bisect(
    model: PreTrainedModel,
    check: Check,
    max_len: int,
    *,
    passes: Selection = None,
    backend: Backend = "eager",
    chunk: int = 256,
    compile: Compile = "auto",
) -> Culprit:
    """Find the passes, and their places, with which ``check(fast)`` is false or raises.

    Nothing is verified meanwhile, so that the check is the only judge. Most passes for compiled
    code (``fxopt passes`` marks them "decode" or "code") only act with ``backend="inductor"``; those that stream
    layers ask for ``compile="layer"``.
    """
    request = Request(max_len, backend=backend, verify="off", chunk=chunk, compile=compile)
    admit(model, request)
    selected = select(passes)
    said = _fails(check, model)
    if said is not None:
        raise InvalidRequestError(f"the check fails on the stock model itself ({said}); no rewrite is to blame")
    progress = Progress()
    with progress.step("capture"):
        captured = request.captured(model)
    trials = _Trials(model, check, captured, request, [p for p in selected if p.required], progress)
    optional = [p for p in selected if not p.required]
    if not trials.fail(optional):
        raise NothingToFindError(
            f"the check passes with all of {', '.join(p.name for p in selected)} on backend {backend!r}: there is "
            'nothing to find. A fault of the compiled code shows with backend="inductor" only'
        )
    found = [] if trials.fail([]) else smallest(optional, trials.fail)
    sites = {}
    for index, rewriter in enumerate(found):
        found[index], named = _narrowed(rewriter, [*found[:index], *found[index + 1 :]], trials)
        if named:
            sites[rewriter.name] = named
    trials.fail(found)  # so that what the check said is said of these
    reproduction = Reproduction(model, tuple(trials.required + found), request, check)
    return Culprit(tuple(found), sites, trials.count, trials.complaint, reproduction)


@dataclass
class _Trials:
    """Optimises with some passes, checks, and remembers what was said."""

    model: PreTrainedModel
    check: Check
    captured: Program
    request: Request
    required: list[Pass[Any]]
    progress: Progress
    count: int = 0
    complaint: str = ""
    fast: Any = None

    def fail(self, passes: Sequence[Pass[Any]]) -> bool:
        self.count += 1
        names = ", ".join(p.name for p in passes) or "only what is needed"
        with self.progress.step(f"trial {self.count}: {names}"):
            self.fast = build(self.model, self.captured, self._ordered(passes), self.request, Progress())
            said = _fails(self.check, self.fast)
        log.info("trial %d, %s: %s", self.count, names, said or "good")
        if said is not None:
            self.complaint = said
        return said is not None

    def _ordered(self, passes: Sequence[Pass[Any]]) -> tuple[Pass[Any], ...]:
        return select([*self.required, *passes])


def _fails(check: Check, model: Any) -> str | None:
    """Why a check does not accept a model, or None if it does."""
    try:
        return None if check(model) else "it returned False"
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def _narrowed(rewriter: Pass[Any], others: list[Pass[Any]], trials: _Trials) -> tuple[Pass[Any], tuple[str, ...]]:
    """The pass at the fewest places that still fail, and where those are; the pass itself if that is all of them."""
    trials.fail([*others, rewriter])
    outcome = trials.fast.fxopt.report[rewriter.name]
    numbers = range(outcome.matched + len(outcome.refused))
    if len(numbers) < 2 or rewriter.stage is Stage.CODE:  # which is applied to whole graphs, as they are compiled
        return rewriter, ()
    numbers_left = smallest(numbers, lambda part: trials.fail([*others, Only(rewriter, tuple(part))]))
    if len(numbers_left) == len(numbers):
        return rewriter, ()
    narrowed = Only(rewriter, tuple(numbers_left))
    trials.fail([*others, narrowed])
    spots = trials.fast.fxopt.report[rewriter.name].sites
    return narrowed, tuple(f"{'' if s.layer is None else f'layer {s.layer}, '}{s.node} ({s.source})" for s in spots)
