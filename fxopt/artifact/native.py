"""Compiled code as bytes: one AOTInductor package for each piece of a graph."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.chain import Chain, Code
from fxopt.errors import ArtifactError, LoweringError, first_line
from fxopt.lower import Lowered, compiling
from fxopt.outline import Region
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    WINDOW,
    Program,
)
from fxopt.specialise import Role

#: How far two compilations of one graph may lie apart, as a part of the largest number.
ALLOWED = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

PAST = 5  # rows that the step of a comparison finds in the cache


def package(program: Program, region: Region) -> bytes:
    """Compile one piece into a package; its weights stay outside."""
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        path = str(Path(folder) / "piece.pt2")
        try:
            with compiling(program):
                files: Any = aot_compile(region.module, tuple(region.examples), options={"aot_inductor.package": True})
            package_aoti(path, files)
        except RuntimeError as error:
            raise LoweringError(f"AOTInductor failed on a piece of the graph: {first_line(error)}") from error
        return Path(path).read_bytes()


def code_of(content: bytes, name: str) -> Code:
    """The code of a package. This is where it begins to run: only for those whose origin is known."""
    # From a copy that nobody else can write to: what was checked is what is loaded.
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        path = Path(folder) / "piece.pt2"
        path.write_bytes(content)
        try:
            # Not by ``aoti_load_package``: it runs compilers to learn about the processor, which takes a second.
            loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except (RuntimeError, OSError) as error:
            raise ArtifactError(
                f"the compiled code in {name} cannot be loaded on this machine: {first_line(error)}; "
                'fxopt.load(folder, model, code="again") compiles the saved graphs anew'
            ) from error

    def run(*given: Tensor) -> Sequence[Any]:
        made: Sequence[Any] = loader.boxed_run(list(given))
        return made

    return run


def check_same(running: Lowered, packed: Chain, role: Role) -> None:
    """Run one small step on the code that is running and on what was packed; raise if they disagree."""
    given, copies = _examples(running, role), _examples(running, role)
    with torch.no_grad():
        ours = running.call(*given, *running.weights)
        theirs = packed(*copies, *running.weights)
    for a, b in zip([*ours, *given], [*theirs, *copies], strict=True):
        allowed = ALLOWED.get(a.dtype, 0.0) * float(a.abs().max())
        if a.shape != b.shape or not float((a - b).abs().max()) <= allowed:
            raise ArtifactError(
                f"the code that was compiled to be saved computes the {role.name} step differently from the code that "
                'is running; nothing was saved. Save with backend="aot_eager", and report it'
            )


def _examples(running: Lowered, role: Role) -> list[Tensor]:
    """What a small step feeds, the same at each call."""
    program = running.program
    capacity, device = program.facts.capacity, program.facts.device
    batch, step = role.batch or 2, min(3, role.longest_step)
    rows = torch.arange(capacity, device=device)
    fed = rows[PAST : PAST + step]
    mask = (rows < PAST + step).long().repeat(batch, 1)
    known = {
        INPUT_IDS: (fed % 7).repeat(batch, 1),
        POSITION_IDS: fed.repeat(batch, 1),
        CACHE_POSITION: fed,
        LOGIT_POSITIONS: rows[:step] if role.all_logits else rows[step - 1 : step],
        ATTENTION_MASK: mask[:, :WINDOW] if running.windowed else mask,
    }
    random = torch.Generator().manual_seed(0)
    inputs = program.placeholders()

    def buffer(name: str) -> Tensor:
        example = inputs[name].meta["val"]
        return torch.randn(batch, *example.shape[1:], generator=random).to(device, example.dtype)

    return [known[name] if name in known else buffer(name) for name in running.plan.inputs]
