"""``optimize``: the whole story on one screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from fxopt.admission import Selection, admit, select
from fxopt.capture import capture
from fxopt.engine import Engine, Limits
from fxopt.errors import LoweringError, VerificationError, first_line
from fxopt.judge import Judge
from fxopt.lower import Backend, Lowered, lower
from fxopt.model import make_fast
from fxopt.outcome import Check
from fxopt.pipeline import Pipeline, Policy, judged_safely
from fxopt.program import Program, whole_windows
from fxopt.progress import Progress
from fxopt.rewrite import Pass
from fxopt.specialise import Role
from fxopt.weights import pack, packed_bytes

Verify = Literal["final", "each", "off"]
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Request:
    """What a user asks of ``optimize``, apart from the model and the passes."""

    max_len: int
    max_batch: int | None = None
    backend: Backend = "inductor"
    verify: Verify = "final"
    strict: bool = False
    chunk: int = 256


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
) -> Model:
    """A second face of ``model`` that generates the same tokens faster.

    ``max_len`` is the longest prompt and answer together. ``passes`` selects rewrites: names, a
    mapping such as ``{"fuse_qkv": False}``, pass objects, or a preset ("default", "minimal").
    ``max_batch`` bounds the batch; None leaves it open, and each new batch size compiles once.
    ``verify="final"`` compares with the stock model before anything is handed out: a pass that
    changes the result is dropped with a warning, or raises under ``strict=True``; "each" compares
    after every pass and reports it; "off" trusts. Prompts are fed in chunks of ``chunk`` tokens.
    The stock model stays as it is.
    """
    admit(model, max_len=max_len, max_batch=max_batch, chunk=chunk, backend=backend, verify=verify)
    selected = select(passes)
    progress = Progress()
    with progress.step("capture"):
        captured = capture(model, max_len=max_len, capacity=whole_windows(max_len), backend=backend)
    return build(model, captured, selected, Request(max_len, max_batch, backend, verify, strict, chunk), progress)


@torch.inference_mode(False)  # weights re-seated in that mode could not be trained afterwards
def build(model: Model, captured: Program, passes: Iterable[Pass[Any]], request: Request, progress: Progress) -> Model:
    """Everything after the capture: rewrite, verify, pack, compile, verify again."""
    judge = None if request.verify == "off" else Judge(model, request.max_len)
    batch = request.max_batch or 1
    pipeline = Pipeline(passes, captured, Policy(request.strict, judge, request.verify == "each", batch))
    report = pipeline.report(type(model).__name__)
    report.seconds = progress.seconds
    with progress.step("rewrite, verifying each pass" if request.verify == "each" else "rewrite"):
        pipeline.run()
    if judge is not None:
        with progress.step("verify the graphs"):
            report.checks.append(pipeline.verify())
    with progress.step("pack weights"):
        pipeline.program = pack(pipeline.program)
        report.packed_bytes = packed_bytes(pipeline.program)

    engine = _compiled(pipeline, request.backend, Limits(request.chunk, request.max_batch), progress)
    if judge is not None:
        with progress.step("verify the compiled code"):
            engine, check = _verified(judge, engine, pipeline, request.backend, progress)
        report.checks.append(check)
    for role in (engine.prefill_role(batch), engine.decode_role(batch)):
        lowered = engine.lowered(role)
        if lowered.proof is not None:
            report.proofs[role.name] = lowered.proof
        if lowered.launches is not None:
            report.launches[role.name] = lowered.launches
    report.stages = pipeline.outcomes
    pipeline.forget_judge()
    return make_fast(model, engine, pipeline.program, report)


def _compiled(pipeline: Pipeline, backend: Backend, limits: Limits, progress: Progress) -> Engine:
    """An engine whose prefill and decode graphs are compiled; other batch sizes follow on first use."""

    def source(role: Role) -> Lowered:
        program = pipeline.specialised(role)
        try:
            return lower(program, backend)
        except RuntimeError as error:
            raise LoweringError(
                f"{backend} failed to compile the {role.name} graph for batch {role.batch}: {first_line(error)} "
                'Inductor needs a C++ compiler (g++); backend="aot_eager" does without'
            ) from error

    engine = Engine(pipeline.program.facts, source, limits)
    batch = limits.max_batch or 1
    for role in (engine.prefill_role(batch), engine.decode_role(batch)):
        with progress.step(f"compile {role.name}"):
            engine.lowered(role)
    return engine


def _verified(
    judge: Judge, engine: Engine, pipeline: Pipeline, backend: Backend, progress: Progress
) -> tuple[Engine, Check]:
    """Compare the compiled code with the stock model; find a decode pass that spoils it by trying without."""
    check, complaint = judged_safely(judge.engine, engine)
    if complaint is None:
        return engine, check
    for suspect in pipeline.decode_passes():
        trial = _compiled(pipeline.without(suspect), backend, engine.limits, progress)
        check, remaining = judged_safely(judge.engine, trial)
        if remaining is None:
            pipeline.drop(suspect, complaint)
            pipeline.forget_decode()  # so that the report is about the graph that runs
            return _compiled(pipeline, backend, engine.limits, progress), check
    raise VerificationError(
        f"the graphs agree with the stock model, but compiled by {backend} they do not: {complaint}. "
        'Try backend="aot_eager", and report it.'
    )
