"""The passes in order over one captured model, and what to do when one of them does harm."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fxopt.driver import apply, require
from fxopt.errors import (
    CacheMemoryError,
    CaptureDiffersError,
    InvalidRequestError,
    RewriteError,
    VerificationError,
    first_line,
    warn,
)
from fxopt.judge import Judge, Verdict
from fxopt.listing import Listing, listing
from fxopt.offload.errors import StoreError
from fxopt.outcome import Check, Outcome
from fxopt.program import Program
from fxopt.provenance import trace
from fxopt.report import Report
from fxopt.rewrite import Pass, Stage
from fxopt.specialise import Role, specialise
from fxopt.step_cost import StepCost, step_cost

log = logging.getLogger("fxopt")

Subject = TypeVar("Subject")
Judged = Callable[[Program], Verdict]


@dataclass(frozen=True)
class Policy:
    """How a pipeline treats its passes. ``judge`` is None where nothing is compared."""

    strict: bool = False
    judge: Judge | None = None
    each: bool = False  # judge after every pass, not only at the end
    batch: int = 1  # of the decode graph that is reported and judged


class Pipeline:
    """Selected passes, the program they lead to, and one outcome each."""

    def __init__(self, passes: Iterable[Pass[Any]], captured: Program, policy: Policy) -> None:
        self.passes = tuple(passes)
        self.captured = captured
        self.policy = policy
        self.program = captured
        self._each = policy.each and policy.judge is not None
        self._outcomes: dict[str, Outcome] = {}
        self._dropped: dict[str, str] = {}
        self._last_check: Check | None = None
        self._exact: Program | None = None  # before a pass rounded weights or what the cache keeps

    @property
    def outcomes(self) -> list[Outcome]:
        """The capture, the passes on the symbolic graph, its specialisation, the passes on that."""
        graphs = ["capture", *self._names(Stage.SYMBOLIC), "specialise", *self._names(Stage.DECODE)]
        order = [*graphs, *self._names(Stage.CODE)]
        return [self._outcomes[name] for name in order if name in self._outcomes]

    @property
    def kept(self) -> tuple[Pass[Any], ...]:
        """The passes of both stages that were not taken out."""
        return tuple(p for p in self.passes if p.name not in self._dropped)

    @property
    def dropped(self) -> dict[str, str]:
        """Why the others were."""
        return dict(self._dropped)

    def report(self, model: str) -> Report:
        """A report on these stages; a pass that comes later is in ``outcomes`` when it has been applied."""
        facts = self.captured.facts
        return Report(model, facts.backend, facts.max_len, self.policy.batch, self._context, self.outcomes)

    @property
    def _context(self) -> int:
        """Rows of the cache that are filled in the step that is costed: those of a half-filled cache."""
        return max(1, self.captured.facts.max_len // 2)

    def latest_graph(self) -> Callable[[], Listing]:
        """The last graph that is in ``outcomes`` so far, as lines."""
        return self.latest()[0]

    def latest(self) -> tuple[Callable[[], Listing], Callable[[], StepCost | None]]:
        """The same, and what a step on it costs."""
        noted = [outcome for outcome in self.outcomes if outcome.dropped is None]

        def last() -> Outcome:
            return next((one for one in reversed(noted) if one.listing), noted[0])

        return (lambda: last().listing), (lambda: last().step)

    def note(self, outcome: Outcome) -> None:
        """Keep what a pass came to that speaks to the compiler."""
        self._outcomes[outcome.name] = outcome
        if outcome.dropped is None:
            self._insist(outcome)

    def cannot(self, rewriter: Pass[Any], reason: str) -> None:
        """Say that a pass can do nothing here, or raise where all of them are insisted on."""
        if self.policy.strict:
            raise RewriteError(f"{rewriter.name} can do nothing: {reason}")
        warn(f"{rewriter.name} can do nothing: {reason}; fxopt goes on without it")

    def forget_judge(self) -> None:
        """Graphs for other batch sizes are made later; what the stock model said need not live on for them."""
        self.policy, self._exact = replace(self.policy, judge=None), None

    def run(self) -> None:
        """Apply every pass for the symbolic graph."""
        judged = self.policy.judge.graph if self.policy.judge is not None else None
        self._exact = None
        for rewriter in self._kept(Stage.CODE):
            self._outcomes[rewriter.name] = Outcome(rewriter.name, rewriter.stage.value, rewriter.summary)
        self._begin(Outcome("capture", "capture", "the model's own code as one graph"), self.captured, judged)
        self.program = self._apply(self.captured, self._kept(Stage.SYMBOLIC), judged)

    def specialised(self, role: Role) -> Program:
        """The graph of a role; a decode graph goes through the passes made for it."""
        program = specialise(self.program, role)
        if role.longest_step > 1:
            return program
        if (role.batch == 1) != (self.policy.batch == 1) or "specialise" in self._outcomes:
            return self._apply(program, self._kept(Stage.DECODE), None, noted=False)

        def judged(decode: Program) -> Verdict:
            assert self.policy.judge is not None
            return self.policy.judge.decode(self.program, decode, self.policy.batch)

        start = Outcome("specialise", "specialise", f"{role.sequences}, one token, numbers for symbols")
        self._begin(start, program, judged)
        return self._apply(program, self._kept(Stage.DECODE), judged)

    def compilable(self, role: Role) -> Program:
        """The graph of a role as it is compiled: with what is done to each of them at the very end."""
        last = [one for one in self._kept(Stage.CODE) if one.expected(self.program)]
        return self._apply(self.specialised(role), last, None, noted=False)

    def attempt(self, rewriter: Pass[Any], program: Program) -> tuple[Program, Outcome] | None:
        """Apply a pass. One that fails has changed nothing, and is taken out."""
        try:
            return apply(rewriter, program)
        except Exception as error:
            self._failed(rewriter, program, error)
            return None

    def verify(self) -> list[Check]:
        """Judge the symbolic program; if it is wrong, go through it again pass by pass and drop what spoils it."""
        if self._each and self._last_check is not None:
            return [self._last_check]
        checks, complaint = self._judged()
        if complaint is not None:
            log.warning("%s; looking for the pass", complaint)
            self._each = True
            self.run()
            checks, complaint = self._judged()
        if complaint is not None:
            raise CaptureDiffersError(
                f"the rewritten graph differs from the stock model ({complaint}), but with no single pass added. "
                'Use the stock model or passes="minimal", and report it.'
            )
        return checks

    def _judged(self) -> tuple[list[Check], str | None]:
        """The program, and before that what it was while nothing was rounded yet."""
        assert self.policy.judge is not None
        checks: list[Check] = []
        for program in (self._exact, self.program):
            if program is not None:
                check, complaint = judged_safely(self.policy.judge.graph, program)
                checks.append(check)
                if complaint is not None:
                    return checks, complaint
        return checks, None

    def drop(self, culprit: Pass[Any], complaint: str) -> None:
        """Take a pass out for good, or raise if that is not allowed."""
        sentence = f"with {culprit.name} applied, {complaint}"
        if culprit.required:
            raise VerificationError(f"{sentence}, and nothing works without it. Use the stock model, and report it.")
        if self.policy.strict:
            raise VerificationError(f"{sentence}. Leave it out of passes, or report it.")
        self._go_on_without(culprit, sentence, complaint)

    def without(self, suspect: Pass[Any]) -> Pipeline:
        """The same with one pass less, to try; nothing is said or kept."""
        trial = copy.copy(self)
        trial._dropped = {**self._dropped, suspect.name: "on trial"}
        trial._outcomes = dict(self._outcomes)
        return trial

    def forget_decode(self) -> None:
        """Note the decode graph anew when it is made next, after one of its passes was dropped."""
        for name in ("specialise", *(p.name for p in self._kept(Stage.DECODE))):
            self._outcomes.pop(name, None)

    def suspects(self) -> list[Pass[Any]]:
        """Who may be at fault if the graphs are right and compiled code is not.

        What speaks to the compiler comes first, since it concerns every graph; then what changed decode graphs.
        """
        kept = self._kept(Stage.DECODE)
        changed = [p for p in kept if p.name in self._outcomes and self._outcomes[p.name].changed_something]
        code = [p for p in self._kept(Stage.CODE) if p.expected(self.program) != 0]  # or None: nobody knows
        return [*code, *changed]

    def _names(self, stage: Stage) -> list[str]:
        return [p.name for p in self.passes if p.stage is stage]

    def _kept(self, stage: Stage) -> list[Pass[Any]]:
        return [p for p in self.passes if p.stage is stage and p.name not in self._dropped]

    def _begin(self, start: Outcome, program: Program, judged: Judged | None) -> None:
        """Note the graph that the next passes start from, and that it is right to begin with."""
        start.nodes_before = start.nodes_after = len(program.graph.nodes)
        self._note(start, program)
        if not self._each or judged is None:
            return
        start.verified, complaint = judged_safely(judged, program)
        self._last_check = start.verified
        if complaint is not None:
            raise CaptureDiffersError(
                f"before any pass, {start.name} made a graph that is wrong: {complaint}. "
                "Use the stock model, and report the architecture."
            )

    def _apply(
        self, program: Program, passes: list[Pass[Any]], judged: Judged | None, *, noted: bool = True
    ) -> Program:
        """Every pass in turn; one that fails or does harm leaves the program as it was."""
        for rewriter in passes:
            if (made := self.attempt(rewriter, program)) is None:
                continue
            result, outcome = made
            log.debug("%s matched %d of %s", rewriter.name, outcome.matched, outcome.expected)
            if noted:
                self._note(outcome, result)
            require(rewriter, outcome)
            if noted:
                self._insist(outcome)
            if not noted or self._is_right(rewriter, result, outcome, judged):
                if result.facts.rounds and not program.facts.rounds:
                    self._exact = program
                program = result
        return program

    def _is_right(self, rewriter: Pass[Any], result: Program, outcome: Outcome, judged: Judged | None) -> bool:
        """Whether a pass may stay; drops it if not."""
        if not self._each or judged is None or not outcome.changed_something:
            return True
        outcome.verified, complaint = judged_safely(judged, result)
        if complaint is not None:
            self.drop(rewriter, complaint)
            return False
        self._last_check = outcome.verified
        return True

    def _note(self, outcome: Outcome, program: Program) -> None:
        """Keep an outcome with the graph that it led to."""
        costed = functools.partial(self._costed, program, outcome.name)
        outcome.show_when_read(functools.partial(listing, program), costed)
        trace(outcome.name, lambda: "\n".join(line.text for line in outcome.listing))
        self._outcomes[outcome.name] = outcome

    def _costed(self, program: Program, name: str) -> StepCost | None:
        """What a step on the graph after a pass costs; a report with a gap is better than none."""
        try:
            return step_cost(program, batch=self.policy.batch, context=self._context)
        except Exception as error:
            log.warning("the step after %s could not be costed: %s", name, first_line(error))
            return None

    def _insist(self, outcome: Outcome) -> None:
        if not self.policy.strict or outcome.is_complete:
            return
        left = [outcome.dropped] if outcome.dropped else [spot.reason for spot in (*outcome.refused, *outcome.near)[:3]]
        raise RewriteError(
            f"{outcome.name} matched {outcome.matched} of {outcome.expected} places "
            f"({'; '.join(left) or 'no site was found'}), and strict=True asks for all"
        )

    def _failed(self, rewriter: Pass[Any], program: Program, error: Exception) -> None:
        """Go on without a pass that raised, unless it is needed."""
        sentence = f"{rewriter.name} failed with {type(error).__name__}: {first_line(error)}"
        if rewriter.required or self.policy.strict:
            raise RewriteError(f"{sentence}. The stock model is unchanged.") from error
        nodes = len(program.graph.nodes)
        self._outcomes[rewriter.name] = Outcome(
            rewriter.name, rewriter.stage.value, rewriter.summary, nodes_before=nodes, nodes_after=nodes
        )
        self._go_on_without(rewriter, sentence, sentence)

    def _go_on_without(self, rewriter: Pass[Any], sentence: str, why: str) -> None:
        warn(f"{sentence}; fxopt goes on without it")
        self._dropped[rewriter.name] = why
        self._outcomes[rewriter.name].dropped = why


def judged_safely(judge: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    """A graph that cannot even be run is as wrong as one with another result.

    What cannot be served, stored or held in memory says nothing about a graph.
    """
    try:
        return judge(subject)
    except (InvalidRequestError, CacheMemoryError, StoreError):
        raise
    except Exception as error:
        return Check("", float("inf"), 0.0), f"the graph fails when run ({type(error).__name__}: {first_line(error)})"
