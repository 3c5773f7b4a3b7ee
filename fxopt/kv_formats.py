"""Rows of the cache in fewer bits: codes, and the scale that brings them back.

    scale = max|row| / 127        codes = round(row / scale)        row ≈ codes * scale

Each row of each head has scales of its own, so a row is written once, when its token comes, and never
touched again. ``run`` calls operators, or writes the calls into a graph: both do the same arithmetic,
in float32. Shapes: B batch, H heads, S rows, D numbers of a row, G groups of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten

FormatName = Literal["int8", "fp8", "int4"]


class Run(Protocol):
    """Does the arithmetic, or writes it down."""

    def __call__(self, operator: Any, *arguments: Any) -> Any:
        """A tensor, or the node that will compute it."""

    def constant(self, name: str, value: Tensor) -> Any:
        """A tensor that is the same every time."""


class _Now:
    """Operators on tensors."""

    def __call__(self, operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    def constant(self, name: str, value: Tensor) -> Any:
        return value


NOW: Run = _Now()


LEAST_SCALE = 2.0**-100  # of a row of zeros
_LOW = 0xFFFF  # the bits of a float32 that a bfloat16 lacks

MIDDLE = 7.5  # of the codes 0 to 15: there are as many above as below
REACH = 7.65  # codes from the middle to the largest number: cutting off a little makes all steps finer
SHARES = 16  # of the row's scale, of which each group has a whole number
DROPPED = 20  # bits of a float32 that a scale in a byte lacks: all but the exponent and three behind it
FIRST = (127 - 24) << 3  # what such a byte counts from: 2 ** -24
SCALES = (2.0**-24, 240.0)  # that it can say
LARGEST_TURN, LEAST_TURN = 64, 8  # numbers that are spread over each other


@dataclass(frozen=True)
class Part:
    """What of a row lies in a buffer of its own."""

    suffix: str  # of the buffer's name; empty for the codes
    dtype: torch.dtype
    width: int  # numbers per head and row


class KVFormat(Protocol):
    """How rows of ``width`` numbers are kept."""

    @property
    def turns(self) -> bool:
        """Whether rows are kept turned: what decodes is to be turned once more."""

    def parts(self, width: int) -> tuple[Part, ...]:
        """The buffers that a row is spread over."""

    def obstacle(self, width: int) -> str | None:
        """Why rows of this width cannot be kept so."""

    def encode(self, run: Run, rows: Any, width: int, device: torch.device) -> tuple[Any, ...]:
        """One value for each part of float32 rows [B, H, S, D]."""

    def decode(self, run: Run, parts: Sequence[Any], width: int, device: torch.device) -> Any:
        """The rows in float32, as near as the parts can say."""


@dataclass(frozen=True)
class Eight:
    """A byte for each number, a scale for each row of a head."""

    code: torch.dtype
    top: float  # the largest code
    turns: bool = False

    def parts(self, width: int) -> tuple[Part, ...]:
        # Eager copies know integers, but not float8: its bits lie in bytes.
        stored = self.code if self.code is torch.int8 else torch.uint8
        return Part("", stored, width), Part("scale", torch.bfloat16, 1)

    def obstacle(self, width: int) -> str | None:
        return None

    def encode(self, run: Run, rows: Any, width: int, device: torch.device) -> tuple[Any, ...]:
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
        wide = run(aten.to.dtype, codes, torch.float32) if self.code is torch.int8 else _from_float8(run, codes)
        return run(aten.mul.Tensor, wide, run(aten.to.dtype, scale, torch.float32))


@dataclass(frozen=True)
class Four:
    """Half a byte for each number and each group's scale, a byte for the row's, of rows that are turned first.

    A few of the numbers of a key are large, and with one of them in a group little is left of the others. An
    orthogonal matrix spreads them over the row; turned alike, queries and keys have the products that they had.
    """

    group: int
    turns: bool = True

    def parts(self, width: int) -> tuple[Part, ...]:
        _, groups, members = self._inner(width)
        codes = Part("", torch.uint8, groups * members)
        return codes, Part("share", torch.uint8, groups), Part("scale", torch.uint8, 1)

    def obstacle(self, width: int) -> str | None:
        if math.gcd(width, LARGEST_TURN) >= LEAST_TURN:
            return None
        return f"its rows have {width} numbers, which is no multiple of {LEAST_TURN}; use int8"

    def encode(self, run: Run, rows: Any, width: int, device: torch.device) -> tuple[Any, ...]:
        grouped = run(aten.unflatten.int, turned(run, rows, width, device), -1, self._inner(width))
        least = run(aten.div.Scalar, run(aten.amax.default, run(aten.abs.default, grouped), [-1], True), REACH)
        most = run(aten.clamp.default, run(aten.amax.default, least, [-3, -2], True), *SCALES)
        bits = run(aten.add.Scalar, run(aten.view.dtype, most, torch.int32), (1 << DROPPED) - 1)
        kept = run(aten.bitwise_right_shift.Tensor_Scalar, bits, DROPPED)  # the exponent and three bits behind it
        step = _of_kept(run, kept)  # [B, H, S, 1, 1, 1]
        share = run(aten.clamp.default, run(aten.round.default, run(aten.div.Tensor, least, step)), 1, SHARES)
        scale = run(aten.mul.Tensor, share, step)
        shifted = run(aten.add.Scalar, run(aten.div.Tensor, grouped, scale), MIDDLE)
        codes = run(aten.clamp.default, run(aten.round.default, shifted), 0, 2 * MIDDLE)
        byte = run(aten.to.dtype, run(aten.sub.Scalar, kept, FIRST), torch.uint8)
        pairs = (_paired(run, halves) for halves in (codes, run(aten.sub.Scalar, share, 1)))
        return *pairs, run(aten.flatten.using_ints, byte, -3, -1)

    def decode(self, run: Run, parts: Sequence[Any], width: int, device: torch.device) -> Any:
        _, groups, members = self._inner(width)
        places = run.constant("kv_nibbles", torch.tensor([0, 4], dtype=torch.uint8, device=device).view(2, 1, 1))
        codes = run(aten.sub.Scalar, _halves(run, parts[0], places, [groups, members]), MIDDLE)  # [B, H, S, 2, G, W]
        share = run(aten.add.Scalar, _halves(run, parts[1], places, [groups, 1]), 1)
        kept = run(aten.add.Scalar, run(aten.to.dtype, parts[2], torch.int32), FIRST)
        step = run(aten.unflatten.int, _of_kept(run, kept), -1, [1, 1, 1])
        rows = run(aten.mul.Tensor, codes, run(aten.mul.Tensor, share, step))
        return run(aten.flatten.using_ints, rows, -3, -1)

    def _inner(self, width: int) -> list[int]:
        """The halves of a row, the groups of a half, the numbers of a group."""
        members = math.gcd(width // 2, self.group)
        return [2, width // 2 // members, members]


def _of_kept(run: Run, kept: Any) -> Any:
    """The step that a group's share counts, from the upper bits of the row's scale."""
    scale = run(aten.view.dtype, run(aten.bitwise_left_shift.Tensor_Scalar, kept, DROPPED), torch.float32)
    return run(aten.mul.Scalar, scale, 1 / SHARES)


def _paired(run: Run, halves: Any) -> Any:
    """Whole numbers up to 15 [..., 2, G, W] as bytes [..., G * W]: the first half of a row below, the second above."""
    low, high = (run(aten.select.int, run(aten.to.dtype, halves, torch.uint8), -3, half) for half in (0, 1))
    return run(aten.flatten.using_ints, run(aten.add.Tensor, low, run(aten.mul.Scalar, high, 16)), -2, -1)


def _halves(run: Run, paired: Any, places: Any, sizes: Sequence[int]) -> Any:
    """Such bytes as float32 [..., 2, *sizes]."""
    once = run(aten.unsqueeze.default, run(aten.unflatten.int, paired, -1, sizes), -3)
    both = run(aten.bitwise_and.Scalar, run(aten.bitwise_right_shift.Tensor, once, places), 15)
    return run(aten.to.dtype, both, torch.float32)


def turned(run: Run, rows: Any, width: int, device: torch.device) -> Any:
    """Float32 rows times a matrix of Hadamard's, block by block; doing it twice leaves them as they were."""
    size = math.gcd(width, LARGEST_TURN)
    matrix = run.constant(f"kv_turn_{size}", hadamard(size).to(device))
    if size == width:
        return run(aten.matmul.default, rows, matrix)
    blocks = run(aten.unflatten.int, rows, -1, [width // size, size])
    return run(aten.flatten.using_ints, run(aten.matmul.default, blocks, matrix), -2, -1)


@functools.cache
def hadamard(size: int) -> Tensor:
    """The orthogonal matrix [size, size] of one number with two signs; ``size`` is a power of two."""
    with torch.inference_mode(False):  # it is kept, and no mode or default of today may get into it
        matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        orthogonal: Tensor = matrix / size**0.5
        return orthogonal


def _from_float8(run: Run, codes: Any) -> Any:
    """What the bits of float8_e4m3fn stand for, moved to where float32 has them: a cast is slow on processors."""
    bits = run(aten.to.dtype, codes, torch.int32)
    sign = run(aten.bitwise_left_shift.Tensor_Scalar, run(aten.bitwise_and.Scalar, bits, 0x80), 24)
    size = run(aten.bitwise_left_shift.Tensor_Scalar, run(aten.bitwise_and.Scalar, bits, 0x7F), DROPPED)
    moved = run(aten.view.dtype, run(aten.bitwise_or.Tensor, sign, size), torch.float32)
    return run(aten.mul.Scalar, moved, 2.0**120)  # exponents of float32 count from -127, these from -7


def _scale(run: Run, least: Any) -> Any:
    """The next scale from ``least`` up that bfloat16 has, in float32.

    By its bits: a compiler may leave out a cast to bfloat16 and back, and codes of another scale than
    the one that is kept would be wrong.
    """
    bits = run(aten.view.dtype, run(aten.clamp_min.default, least, LEAST_SCALE), torch.int32)
    rounded = run(aten.bitwise_and.Scalar, run(aten.add.Scalar, bits, _LOW), ~_LOW)
    return run(aten.view.dtype, rounded, torch.float32)


#: For K and for V: of keys a little more is kept, since softmax makes much of their errors.
FORMATS: dict[FormatName, tuple[KVFormat, KVFormat]] = {
    "int8": (Eight(torch.int8, 127.0), Eight(torch.int8, 127.0)),
    "fp8": (Eight(torch.float8_e4m3fn, 448.0), Eight(torch.float8_e4m3fn, 448.0)),
    "int4": (Four(8), Four(32)),
}
