"""``optimize``: the whole story on one screen."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from fxopt.admission import Selection, admit, select
from fxopt.artifact.keys import Recipe
from fxopt.choices import choose, note_linears, note_times
from fxopt.compiler import Compiler, arena_outcome, unplaceable
from fxopt.engine import Engine, Limits
from fxopt.errors import CaptureDiffersError, VerificationError, first_line
from fxopt.judge import Judge
from fxopt.lower import Backend, Compile
from fxopt.model import make_fast
from fxopt.outcome import Check
from fxopt.passes.offload_kv import OffloadKV
from fxopt.passes.offload_weights import OffloadWeights
from fxopt.passes.plan_memory import PlanMemory
from fxopt.pipeline import Pipeline, Policy, judged_safely
from fxopt.program import Program
from fxopt.progress import Progress
from fxopt.report import Report
from fxopt.request import Request, Verify
from fxopt.rewrite import Pass
from fxopt.row_streams import RowStreams
from fxopt.stream_notes import forget_timed, note_rows, note_weights, stream_outcome
from fxopt.stream_options import StreamingPass
from fxopt.streaming import WeightStreams, admit_streams, moved, streamed_rows
from fxopt.weights import code_bytes, pack, packed_bytes

log = logging.getLogger("fxopt")

Model = TypeVar("Model", bound=PreTrainedModel)


def optimize(
    model: Model,
    max_len: int,
    *,
    passes: Selection = None,
    max_batch: int | None = None,
    backend: Backend = "inductor",
    verify: Verify = "final",
    strict: bool = False,
    chunk: int = 256,
    compile: Compile = "auto",
    max_cache_bytes: int | None = None,
) -> Model:
    """A second face of ``model`` that generates the same tokens faster.

    ``max_len`` is the longest prompt and answer together. ``passes`` selects rewrites: names, a
    mapping such as ``{"fuse_qkv": False}``, pass objects, or a preset ("default", "minimal").
    ``max_batch`` bounds the batch; None leaves it open. One sequence has graphs of its own, any
    other number shares one set: compiled now where ``max_batch`` names a number, else on first use.
    ``verify="final"`` compares with the stock model before anything is handed out: a pass that
    changes the result is dropped with a warning, or raises under ``strict=True``; "each" compares
    after every pass and reports it; "off" trusts. Prompts are fed in chunks of ``chunk`` tokens.
    ``compile="layer"`` compiles layers that are alike once, "whole" compiles the graph as one, and
    "auto" chooses by depth. ``max_cache_bytes`` bounds the memory of all caches together.
    The stock model stays as it is.
    """
    request = Request(max_len, max_batch, backend, verify, strict, chunk, compile, max_cache_bytes)
    admit(model, request)
    selected = select(passes)
    try:
        return _optimized(model, selected, request, twins=True)
    except CaptureDiffersError as error:
        log.warning("%s; trying again, every layer traced by itself", first_line(error))
        return _optimized(model, selected, request, twins=False)


def _optimized(model: Model, selected: Iterable[Pass[Any]], request: Request, *, twins: bool) -> Model:
    progress = Progress()
    with progress.step("capture"):
        captured = request.captured(model, twins=twins)
    return build(model, captured, selected, request, progress)


@torch.inference_mode(False)  # weights re-seated in that mode could not be trained afterwards
def build(model: Model, captured: Program, passes: Iterable[Pass[Any]], request: Request, progress: Progress) -> Model:
    """Everything after the capture: rewrite, verify, pack, compile, verify again."""
    judge = None if request.verify == "off" else Judge(model, request.max_len)
    batch = request.max_batch or 1
    pipeline = Pipeline(passes, captured, Policy(request.strict, judge, request.verify == "each", batch))
    admit_streams(pipeline.kept, captured.facts)
    _insist_on_arena(pipeline, request.backend)
    report = pipeline.report(type(model).__name__)
    report.seconds = progress.seconds
    with progress.step("rewrite, verifying each pass" if request.verify == "each" else "rewrite"):
        pipeline.run()
    if judge is not None:
        with progress.step("verify the graphs"):
            report.checks += pipeline.verify()
    row_streams = streamed_rows(pipeline.kept, pipeline.program, batch)
    weight_streams = None
    if any(isinstance(one, OffloadWeights) for one in pipeline.kept):
        if judge is not None:
            judge.ask(_engine_batches(request.limits), pipeline.program.facts)
        with progress.step("move weights"):
            weight_streams = moved(pipeline.kept, pipeline.program, model)
    with progress.step("pack weights"):
        pipeline.program = pack(pipeline.program)
        report.packed_bytes = packed_bytes(pipeline.program)
        report.code_bytes, report.coded_bytes = code_bytes(pipeline.program)
    choose(pipeline, batch, progress)

    engine = _compiled(pipeline, request.backend, request.limits, progress, weight_streams, row_streams)
    if judge is not None:
        with progress.step("verify the compiled code"):
            engine, checks = _verified(judge, engine, pipeline, request.backend, progress, weight_streams, row_streams)
        report.checks += checks
    for role in (engine.prefill_role(batch), engine.decode_role(batch)):
        lowered = engine.lowered(role)
        if lowered.proof is not None:
            report.proofs[role.name] = lowered.proof
        if lowered.launches is not None:
            report.launches[role.name] = lowered.launches
    report.graphs = engine.readiness()
    note_linears(pipeline)
    _note_arena(report, pipeline, engine, request.backend)
    _note_streams(report, pipeline, engine, progress, weight_streams)
    note_times(report, pipeline)
    report.stages = pipeline.outcomes
    pipeline.forget_judge()
    recipe = Recipe(asdict(request), pipeline.kept, pipeline.dropped)
    symbolic = pipeline.program
    return make_fast(model, engine, lambda: symbolic, report, recipe)


def _compiled(
    pipeline: Pipeline,
    backend: Backend,
    limits: Limits,
    progress: Progress,
    weight_streams: WeightStreams | None,
    row_streams: RowStreams | None,
) -> Engine:
    """An engine whose prefill and decode graphs are compiled; other batch sizes follow on first use."""
    facts = pipeline.program.facts
    if not any(isinstance(one, OffloadWeights) for one in pipeline.kept):
        weight_streams = None
    if not any(isinstance(one, OffloadKV) for one in pipeline.kept):
        row_streams = None
    compiler = Compiler(backend, pipeline.kept, facts, limits, weight_streams, row_streams, dumps=True)
    ring = weight_streams.ring if weight_streams is not None else None
    engine = Engine(
        facts, lambda role: compiler(pipeline.compilable(role), role), limits, compiler.arena, ring, row_streams
    )
    for role in engine.first_roles():
        with progress.step(f"compile {role.name} for {role.sequences}"):
            engine.lowered(role)
    return engine


def _insist_on_arena(pipeline: Pipeline, backend: Backend) -> None:
    """Say before any work is done that there can be no arena, if one was asked for."""
    for rewriter in pipeline.kept:
        if isinstance(rewriter, PlanMemory) and (reason := unplaceable(backend, pipeline.captured.facts.device)):
            pipeline.cannot(rewriter, reason)


def _note_arena(report: Report, pipeline: Pipeline, engine: Engine, backend: Backend) -> None:
    """Say what of the compiled code computes in the arena, if it was asked to."""
    for rewriter in pipeline.kept:
        if isinstance(rewriter, PlanMemory):
            why_not = unplaceable(backend, pipeline.captured.facts.device)
            pipeline.note(arena_outcome(rewriter, why_not, engine.compiled))
    graphs = {f"{role.name} for {role.sequences}": graph.arena_use for role, graph in engine.compiled.items()}
    report.arenas = {name: use for name, use in graphs.items() if use is not None}


def _note_streams(
    report: Report, pipeline: Pipeline, engine: Engine, progress: Progress, weight_streams: WeightStreams | None
) -> None:
    """Say what is streamed and what that should cost, if it was asked for."""
    if weight_streams is not None and engine.weight_ring is not None:
        with progress.step("time streamed weights"):
            report.streamed_weights = note_weights(weight_streams, engine, report.context)
    if engine.row_streams is not None:
        with progress.step("time a streamed cache"):
            report.streamed_cache = note_rows(engine.row_streams, engine, report.context)
    forget_timed(engine)
    for rewriter in pipeline.kept:
        if isinstance(rewriter, StreamingPass):
            use = report.streamed_cache if isinstance(rewriter, OffloadKV) else report.streamed_weights
            pipeline.note(stream_outcome(rewriter, use, pipeline.latest_graph()))


def _verified(
    judge: Judge,
    engine: Engine,
    pipeline: Pipeline,
    backend: Backend,
    progress: Progress,
    weight_streams: WeightStreams | None,
    row_streams: RowStreams | None,
) -> tuple[Engine, list[Check]]:
    """Compare the compiled code with the stock model; find a decode pass that spoils it by trying without."""
    checks, complaint = _judged(judge, engine)
    if complaint is None:
        return engine, checks
    for suspect in pipeline.suspects():
        trial = _compiled(pipeline.without(suspect), backend, engine.limits, progress, weight_streams, row_streams)
        checks, remaining = _judged(judge, trial)
        if remaining is None:
            pipeline.drop(suspect, complaint)
            pipeline.forget_decode()  # so that the report is about the graph that runs
            return _compiled(pipeline, backend, engine.limits, progress, weight_streams, row_streams), checks
    raise VerificationError(
        f"the graphs agree with the stock model, but compiled by {backend} they do not: {complaint}. "
        'Try backend="aot_eager", and report it.'
    )


def _engine_batches(limits: Limits) -> list[int]:
    """The batches with which compiled code is judged."""
    return sorted({1, limits.max_batch or 1}, reverse=True)


def _judged(judge: Judge, engine: Engine) -> tuple[list[Check], str | None]:
    """A check for every batch that has compiled graphs of its own, up to the first that fails."""
    checks = []
    for batch in _engine_batches(engine.limits):
        check, complaint = judged_safely(functools.partial(judge.engine, batch=batch), engine)
        checks.append(check)
        if complaint is not None:
            return checks, complaint
    return checks, None
