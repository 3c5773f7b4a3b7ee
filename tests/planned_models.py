"""Graphs of tiny models as they are planned: rewritten, packed and specialised, each made once."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fxopt.families import tiny
from fxopt.passes import DEFAULT_PASSES
from fxopt.pipeline import Pipeline, Policy
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    Program,
)
from fxopt.request import Request
from fxopt.shape_sets import ShapeSet, examples
from fxopt.specialise import Role
from fxopt.weights import pack

CHUNK, MAX_LEN = 32, 200


@cache
def captured(family: str, layers: int = 2) -> Program:
    return Request(MAX_LEN, backend="eager", chunk=CHUNK).captured(tiny(family, layers=layers))


@cache
def rewritten(family: str, layers: int = 2) -> Pipeline:
    pipeline = Pipeline([kind() for kind in DEFAULT_PASSES], captured(family, layers), Policy())
    pipeline.run()
    pipeline.program = pack(pipeline.program)
    return pipeline


@cache
def specialised(family: str, role: str, batch: int | None, layers: int = 2) -> Program:
    """The "prefill" or the "decode" graph."""
    return rewritten(family, layers).specialised(Role(role, batch, CHUNK if role == "prefill" else 1))


def inputs_of(program: Program, shapes: ShapeSet, seed: int = 0) -> list[Tensor]:
    """Inputs of these shapes, as the engine would lay them out: the last rows of the window are new."""
    made: list[Tensor] = []
    numbers = torch.Generator().manual_seed(seed)
    for name, layout in zip(program.placeholders(), examples(program, shapes), strict=True):
        window = shapes["window"]
        if name == INPUT_IDS:
            made.append(torch.randint(0, 128, layout.sizes, generator=numbers))
        elif name == ATTENTION_MASK:
            made.append(torch.ones(layout.sizes[0], program.facts.capacity, dtype=torch.long)[:, :window])
        elif name in (POSITION_IDS, CACHE_POSITION):
            rows = torch.arange(window - layout.sizes[-1], window)
            made.append(rows.expand(layout.sizes).contiguous())
        elif name == LOGIT_POSITIONS:
            made.append(torch.arange(layout.sizes[0]))
        else:
            made.append(torch.randn(layout.sizes, generator=numbers))
    return made
