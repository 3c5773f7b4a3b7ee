"""What only a clock can choose: ways to compute the same are timed, and the facts say which was quickest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fxopt.attention_timing import timed_attention
from fxopt.driver import apply
from fxopt.errors import first_line, warn
from fxopt.linear_timing import timed_linears
from fxopt.passes.decode_attention import DecodeAttention
from fxopt.passes.linear_library import LinearLibrary
from fxopt.passes.plan_memory import PlanMemory
from fxopt.pipeline import Pipeline
from fxopt.progress import Progress
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
        if isinstance(rewriter, LinearLibrary):
            _, outcome = apply(rewriter, pipeline.program)
            outcome.show_when_read(*pipeline.latest())
            pipeline.note(outcome)


def _timing(
    rewriter: Pass[Any], pipeline: Pipeline, batch: int
) -> tuple[str, str, Callable[[], TimedForms | None]] | None:
    """What there is to time for a pass: its name, the fact that it is, and how."""
    program = pipeline.program
    if isinstance(rewriter, DecodeAttention) and (forms := rewriter.candidates(program.facts)):
        return "decode attention", "attention", lambda: timed_attention(program, forms, batch)
    planned = any(isinstance(one, PlanMemory) for one in pipeline.kept)  # it places what the first library makes
    if isinstance(rewriter, LinearLibrary) and not planned and (libraries := rewriter.candidates(program)):
        return "matrix products", "linears", lambda: timed_linears(program, libraries, rewriter)
    return None
