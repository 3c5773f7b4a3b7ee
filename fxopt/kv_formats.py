"""Rows of the cache in fewer bits: codes, and the scale that brings them back.

    scale = max|row| / 127        codes = round(row / scale)        row ≈ codes * scale

Each row of each head has a scale of its own, so a row is written once, when its token comes, and never
touched again. ``run`` calls an operator, or writes the call into a graph: both do the same arithmetic,
in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

aten = torch.ops.aten

FormatName = Literal["int8", "fp8", "int4"]
Run = Callable[..., Any]  # (operator, *arguments) -> a tensor, or the node that computes it

LEAST_SCALE = 2.0**-100  # of a row of zeros
GROUP = 64  # numbers that share a scale and a zero, where there is one
_LOW = 0xFFFF  # the bits of a float32 that a bfloat16 lacks


@dataclass(frozen=True)
class Part:
    """What of a row lies in a buffer of its own."""

    suffix: str  # of the buffer's name; empty for the codes
    dtype: torch.dtype
    width: int  # numbers per head and row


class KVFormat(Protocol):
    """How rows of ``width`` numbers are kept."""

    def parts(self, width: int) -> tuple[Part, ...]:
        """The buffers that a row is spread over."""

    def obstacle(self, width: int) -> str | None:
        """Why rows of this width cannot be kept so."""

    def encode(self, run: Run, rows: Any, width: int) -> tuple[Any, ...]:
        """One value for each part of float32 rows [B, H, S, D]."""

    def decode(self, run: Run, parts: Sequence[Any], width: int, device: torch.device) -> Any:
        """The rows in float32, as near as the parts can say."""


@dataclass(frozen=True)
class Eight:
    """A byte for each number, a scale for each row of a head."""

    code: torch.dtype
    top: float  # the largest code

    def parts(self, width: int) -> tuple[Part, ...]:
        # Eager copies know integers, but not float8: its bits lie in bytes.
        stored = self.code if self.code is torch.int8 else torch.uint8
        return Part("", stored, width), Part("scale", torch.bfloat16, 1)

    def obstacle(self, width: int) -> str | None:
        return None

    def encode(self, run: Run, rows: Any, width: int) -> tuple[Any, ...]:
        most = run(aten.amax.default, run(aten.abs.default, rows), [-1], True)
        scale = _scale(run, run(aten.div.Scalar, most, self.top))
        codes = run(aten.div.Tensor, rows, scale)
        if self.code is torch.int8:
            codes = run(aten.to.dtype, run(aten.round.default, codes), torch.int8)
        else:
            codes = run(aten.view.dtype, run(aten.to.dtype, codes, self.code), torch.uint8)
        return codes, run(aten.to.dtype, scale, torch.bfloat16)

    def decode(self, run: Run, parts: Sequence[Any], width: int, device: torch.device) -> Any:
        codes, scale = parts
        if self.code is not torch.int8:
            codes = run(aten.view.dtype, codes, self.code)
        wide = (run(aten.to.dtype, part, torch.float32) for part in (codes, scale))
        return run(aten.mul.Tensor, *wide)


def _scale(run: Run, least: Any) -> Any:
    """The next scale from ``least`` up that bfloat16 has, in float32.

    By its bits: a compiler may leave out a cast to bfloat16 and back, and codes of another scale than
    the one that is kept would be wrong.
    """
    bits = run(aten.view.dtype, run(aten.clamp_min.default, least, LEAST_SCALE), torch.int32)
    rounded = run(aten.bitwise_and.Scalar, run(aten.add.Scalar, bits, _LOW), ~_LOW)
    return run(aten.view.dtype, rounded, torch.float32)


def call(operator: Any, *arguments: Any, **options: Any) -> Any:
    """``run`` for tensors."""
    return operator(*arguments, **options)


FORMATS: dict[FormatName, KVFormat] = {
    "int8": Eight(torch.int8, 127.0),
    "fp8": Eight(torch.float8_e4m3fn, 448.0),
}
