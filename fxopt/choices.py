"""What only a clock can choose: ways to compute the same are timed, and the facts say which was quickest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fxopt.attention_timing import timed_attention
from fxopt.compiler import unplaceable
from fxopt.errors import first_line, warn
from fxopt.linear_timing import timed_linears
from fxopt.passes.decode_attention import DecodeAttention
from fxopt.passes.linear_library import LinearLibrary
from fxopt.passes.plan_memory import PlanMemory
from fxopt.pipeline import Pipeline
from fxopt.progress import Progress
from fxopt.report import Report
from fxopt.rewrite import Pass
from fxopt.timed_forms import TimedForms


def choose(pipeline: Pipeline, batch: int, progress: Progress) -> None:
    """Time what the passes leave to a clock, and note it for them."""
    for rewriter in pipeline.kept:
        if (timing := _timing(rewriter, pipeline, batch)) is None:
            continue
        what, field, timed = timing
        with progress.step(f"time {what}"):
            try:
                found = timed()
            except RuntimeError as error:  # memory, or a recording
                warn(f"{what} cannot be timed: {first_line(error)}; the library's kernel stays")
                continue
        noted: dict[str, Any] = {field: found}
        pipeline.program = replace(pipeline.program, facts=replace(pipeline.program.facts, **noted))


def note_linears(pipeline: Pipeline) -> None:
    """Say what every graph that is compiled loses and gains by the library that was chosen."""
    for rewriter in pipeline.kept:
        if isinstance(rewriter, LinearLibrary) and (made := pipeline.attempt(rewriter, pipeline.program)) is not None:
            _, outcome = made
            outcome.show_when_read(*pipeline.latest())
            pipeline.note(outcome)


def note_times(report: Report, pipeline: Pipeline) -> None:
    """Say what was timed for passes that were not taken out again."""
    facts = pipeline.program.facts
    applied = {outcome.name for outcome in pipeline.outcomes if outcome.dropped is None}
    report.attention = facts.attention if DecodeAttention.name in applied else None
    report.linears = facts.linears if LinearLibrary.name in applied else None


def _timing(
    rewriter: Pass[Any], pipeline: Pipeline, batch: int
) -> tuple[str, str, Callable[[], TimedForms | None]] | None:
    """What there is to time for a pass: its name, the fact that it is, and how."""
    program = pipeline.program
    if isinstance(rewriter, DecodeAttention) and (forms := rewriter.candidates(program.facts)):
        return "decode attention", "attention", lambda: timed_attention(program, forms, batch)
    if isinstance(rewriter, LinearLibrary) and not _places(pipeline) and (libraries := rewriter.candidates(program)):
        return "matrix products", "linears", lambda: timed_linears(program, libraries, rewriter)
    return None


def _places(pipeline: Pipeline) -> bool:
    """Whether there is an arena for results: PyTorch's own library writes into it, oneDNN makes memory of its own."""
    facts = pipeline.program.facts
    return (
        any(isinstance(one, PlanMemory) for one in pipeline.kept) and unplaceable(facts.backend, facts.device) is None
    )
