"""The passes in order over one captured model, and what to do when one of them does harm."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from fxopt.errors import RewriteError, VerificationError, first_line
from fxopt.program import Program
from fxopt.report import Check
from fxopt.rewrite import Outcome, Pass, Stage, apply, require
from fxopt.specialise import Role, specialise

log = logging.getLogger("fxopt")

#: Judges a rewritten program: the worst error, and a sentence if it is too large.
Judge = Callable[[Program], tuple[Check, str | None]]


class Pipeline:
    """Selected passes, the program they lead to, and one outcome each."""

    def __init__(self, passes: Iterable[Pass[Any]], captured: Program, *, strict: bool) -> None:
        self.passes = tuple(passes)
        self.captured = captured
        self.strict = strict
        self.program = captured
        self._outcomes: dict[str, Outcome] = {}
        self._dropped: dict[str, str] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        return [self._outcomes[p.name] for p in self.passes if p.name in self._outcomes]

    def run(self) -> None:
        """Apply every pass for the symbolic graph."""
        self.program = self._apply(self.captured, self._kept(Stage.SYMBOLIC))

    def specialised(self, role: Role) -> Program:
        """The graph of a role; a decode graph goes through the passes made for it."""
        program = specialise(self.program, role)
        return self._apply(program, self._kept(Stage.DECODE)) if role.longest_step == 1 else program

    def verify(self, judge: Judge) -> Check:
        """Judge the symbolic program; find the pass that spoils it by replay, and drop it."""
        while True:
            check, complaint = _judged(judge, self.program)
            if complaint is None:
                return check
            culprit = self._first_bad(judge)
            self.drop(culprit, complaint)
            self.run()

    def drop(self, culprit: Pass[Any], complaint: str) -> None:
        """Take a pass out for good, or raise if that is not allowed."""
        sentence = f"with {culprit.name} applied, the {complaint}"
        if self.strict or culprit.required:
            if culprit.required:
                raise VerificationError(
                    f"{sentence}, and nothing works without it. Use the stock model, and report it."
                )
            raise VerificationError(f"{sentence}. Leave it out of passes, or report it.")
        warnings.warn(f"{sentence}; fxopt goes on without it", stacklevel=4)
        self._dropped[culprit.name] = complaint
        self._outcomes[culprit.name].dropped = complaint

    def without(self, suspect: Pass[Any]) -> Pipeline:
        """The same with one pass less, to try; nothing is said or kept."""
        trial = copy.copy(self)
        trial._dropped = {**self._dropped, suspect.name: "on trial"}
        trial._outcomes = dict(self._outcomes)
        return trial

    def decode_passes(self) -> list[Pass[Any]]:
        """The passes still applied to decode graphs that changed something there."""
        kept = self._kept(Stage.DECODE)
        return [p for p in kept if p.name in self._outcomes and self._outcomes[p.name].matched > 0]

    def _kept(self, stage: Stage) -> list[Pass[Any]]:
        return [p for p in self.passes if p.stage is stage and p.name not in self._dropped]

    def _first_bad(self, judge: Judge) -> Pass[Any]:
        """Replay the pipeline pass by pass; the first whose result is judged wrong."""
        program = self.captured
        runnable = False
        for rewriter in self._kept(Stage.SYMBOLIC):
            program, _ = apply(rewriter, program)
            runnable = runnable or rewriter.name == "static_kv"
            if runnable and _judged(judge, program)[1] is not None:
                return rewriter
        raise VerificationError(
            "the rewritten graph differs from the stock model, but with no single pass added. "
            'Use the stock model or passes="minimal", and report it.'
        )

    def _apply(self, program: Program, passes: list[Pass[Any]]) -> Program:
        for rewriter in passes:
            try:
                program, outcome = apply(rewriter, program)
            except Exception as error:
                self._failed(rewriter, program, error)
                continue
            log.debug("%s matched %d of %s", rewriter.name, outcome.matched, outcome.expected)
            self._outcomes[rewriter.name] = outcome
            require(rewriter, outcome)
            if self.strict and outcome.matched < (outcome.expected or 0):
                reasons = "; ".join(refusal.reason for refusal in outcome.refused[:3]) or "no site was found"
                raise RewriteError(
                    f"{rewriter.name} matched {outcome.matched} of {outcome.expected} places ({reasons}), "
                    "and strict=True asks for all"
                )
        return program

    def _failed(self, rewriter: Pass[Any], program: Program, error: Exception) -> None:
        """A pass that raised has changed nothing; go on without it unless it is needed."""
        sentence = f"{rewriter.name} failed with {type(error).__name__}: {first_line(error)}"
        if rewriter.required or self.strict:
            raise RewriteError(f"{sentence}. The stock model is unchanged.") from error
        warnings.warn(f"{sentence}; fxopt goes on without it", stacklevel=4)
        nodes = len(program.graph.nodes)
        self._dropped[rewriter.name] = sentence
        self._outcomes[rewriter.name] = Outcome(rewriter.name, nodes_before=nodes, nodes_after=nodes, dropped=sentence)


def _judged(judge: Judge, program: Program) -> tuple[Check, str | None]:
    """A graph that cannot even be run is as wrong as one with another result."""
    try:
        return judge(program)
    except Exception as error:
        return Check("", float("inf"), 0.0), f"graph fails when run ({type(error).__name__}: {first_line(error)})"
