"""``optimize``: the whole story on one screen."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import PreTrainedModel

from fxopt.admission import Selection, admit, select
from fxopt.capture import capture
from fxopt.engine import Engine, Limits, capacity_for
from fxopt.errors import LoweringError, VerificationError, first_line
from fxopt.lower import Backend, Lowered, lower
from fxopt.model import make_fast
from fxopt.pipeline import Pipeline
from fxopt.progress import Progress
from fxopt.report import Check, Report
from fxopt.specialise import Role
from fxopt.verify import check_engine, judge_for
from fxopt.weights import pack, packed_bytes

Model = TypeVar("Model", bound=PreTrainedModel)


@torch.inference_mode(False)  # weights re-seated in that mode could not be trained afterwards
def optimize(
    model: Model,
    max_len: int,
    *,
    passes: Selection = None,
    max_batch: int | None = None,
    backend: Backend = "inductor",
    verify: str = "final",
    strict: bool = False,
    chunk: int = 256,
) -> Model:
    """A second face of ``model`` that generates the same tokens faster.

    ``max_len`` is the longest prompt and answer together. ``passes`` selects rewrites: names, a
    mapping such as ``{"fuse_qkv": False}``, pass objects, or a preset ("default", "minimal").
    ``max_batch`` bounds the batch; None leaves it open, and each new batch size compiles once.
    ``verify="final"`` compares with the stock model before anything is handed out: a pass that
    changes the result is dropped with a warning, or raises under ``strict=True``; "off" trusts.
    Prompts are fed in chunks of ``chunk`` tokens. The stock model stays as it is.
    """
    admit(model, max_len=max_len, max_batch=max_batch, chunk=chunk, backend=backend, verify=verify)
    selected = select(passes)
    progress = Progress()
    report = Report(type(model).__name__, backend, max_len, seconds=progress.seconds)

    with progress.step("capture"):
        captured = capture(model, max_len=max_len, capacity=capacity_for(max_len), backend=backend)
    pipeline = Pipeline(selected, captured, strict=strict)
    with progress.step("rewrite"):
        pipeline.run()
    if verify == "final":
        with progress.step("verify the graphs"):
            report.checks.append(pipeline.verify(judge_for(model, max_len)))
    with progress.step("pack weights"):
        pipeline.program = pack(pipeline.program)
        report.packed_bytes = packed_bytes(pipeline.program)

    engine = _compiled(pipeline, backend, Limits(chunk, max_batch), progress)
    if verify == "final":
        with progress.step("verify the compiled code"):
            engine, check = _verified(model, engine, pipeline, backend, progress)
        report.checks.append(check)
    batch = max_batch or 1
    for role in (engine.prefill_role(batch), engine.decode_role(batch)):
        proof = engine.lowered(role).proof
        if proof is not None:
            report.proofs[role.name] = proof
    report.passes = pipeline.outcomes
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
    model: PreTrainedModel, engine: Engine, pipeline: Pipeline, backend: Backend, progress: Progress
) -> tuple[Engine, Check]:
    """Compare the compiled code with the stock model; find a decode pass that spoils it by trying without."""
    check, complaint = check_engine(model, engine, "the compiled code")
    if complaint is None:
        return engine, check
    for suspect in pipeline.decode_passes():
        trial = _compiled(pipeline.without(suspect), backend, engine.limits, progress)
        check, remaining = check_engine(model, trial, "the compiled code")
        if remaining is None:
            pipeline.drop(suspect, complaint)
            return trial, check
    raise VerificationError(
        f"the graphs agree with the stock model, but compiled by {backend} the {complaint}. "
        'Try backend="aot_eager", and report it.'
    )
