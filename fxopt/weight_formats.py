"""Weights in fewer bits: codes, and the scales that bring them back.

    int8    scale = max|row| / 127                 codes = round(row / scale)
    int4    scale = (most - least) / 15            codes = round((group - least) / scale)

``run`` calls operators, or writes the calls into a graph: both do the same arithmetic, in float32.
Shapes: N rows of a weight, each of K numbers, G groups in half a row, M numbers of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from fxopt.kv_formats import NOW, Run

aten = torch.ops.aten

WeightFormatName = Literal["int8", "int4"]
WEIGHT_FORMATS: tuple[str, ...] = get_args(WeightFormatName)

GROUP = 32  # numbers with a scale of their own, where nobody says another number
LEAST_GROUP = 8
LEAST_SCALE = 2.0**-100  # of numbers that are all the same
MOST_AT_ONCE = 2**22  # numbers that are rounded together
#: Of the span of a group, what its codes may reach over: cutting off a little makes all steps finer.
SPANS = (1.0, 0.95, 0.9, 0.85)


class WeightFormat(Protocol):
    """How the rows of a weight are kept."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What the tensors are called that a weight is spread over; the codes first."""

    def obstacle(self, width: int) -> str | None:
        """Why rows of this width cannot be kept so."""

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        """One tensor for each part of a weight [N, K]; every row by itself."""

    def decode(self, run: Run, parts: Sequence[Any], width: int) -> Any:
        """The weight [N, K] in float32, as near as the parts can say."""

    def fold(self, width: int) -> list[int]:
        """The sizes in which ``total`` takes a vector."""

    def total(self, run: Run, vector: Any, parts: Sequence[Any], width: int) -> Any:
        """The weight times one float32 vector, [N]: codes are widened inside the loop that sums them."""


@dataclass(frozen=True)
class EightBits:
    """A byte for each number, a scale for each row."""

    parts: tuple[str, ...] = ("codes", "scale")

    def obstacle(self, width: int) -> str | None:
        return None

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        rows = weight.to(torch.float32)
        scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp_min(LEAST_SCALE)
        return (rows / scale).round().to(torch.int8), scale

    def decode(self, run: Run, parts: Sequence[Any], width: int) -> Any:
        codes, scale = parts
        return run(aten.mul.Tensor, run(aten.to.dtype, codes, torch.float32), scale)

    def fold(self, width: int) -> list[int]:
        return [1, width]

    def total(self, run: Run, vector: Any, parts: Sequence[Any], width: int) -> Any:
        codes, scale = parts
        product = run(aten.mul.Tensor, vector, run(aten.to.dtype, codes, torch.float32))
        return run(aten.mul.Tensor, run(aten.sum.dim_IntList, product, [-1]), run(aten.squeeze.dim, scale, -1))


@dataclass(frozen=True)
class FourBits:
    """Half a byte for each number, two bfloat16 for each group: the step between codes, and what code 0 stands for.

    A byte holds a number of the first half of its row below, and one of the second half above: each half is then
    read as a run of bytes.
    """

    group: int
    parts: tuple[str, ...] = ("codes", "scale", "least")

    def obstacle(self, width: int) -> str | None:
        if width % 2 == 0 and self._members(width) >= LEAST_GROUP:
            return None
        return f"its rows have {width} numbers, whose halves have no groups of {LEAST_GROUP} or more; use int8"

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        width = weight.shape[1]
        rows = max(1, MOST_AT_ONCE // width)
        made = [self._encoded(part.to(torch.float32)) for part in weight.split(rows)]
        codes, scale, least = (torch.cat(part) for part in zip(*made, strict=True))
        return codes, scale, least

    def decode(self, run: Run, parts: Sequence[Any], width: int) -> Any:
        places = run.constant("coded_nibbles", torch.tensor([0, 4], dtype=torch.uint8).view(2, 1, 1))
        twice = run(aten.unsqueeze.default, self._grouped(run, parts[0], width), 1)
        codes = run(aten.bitwise_and.Scalar, run(aten.bitwise_right_shift.Tensor, twice, places), 15)
        scale, least = (self._of_halves(run, part) for part in parts[1:])
        wide = run(aten.mul.Tensor, run(aten.to.dtype, codes, torch.float32), scale)
        return run(aten.flatten.using_ints, run(aten.add.Tensor, wide, least), 1, -1)

    def fold(self, width: int) -> list[int]:
        return [2, width // 2 // self._members(width), self._members(width)]

    def total(self, run: Run, vector: Any, parts: Sequence[Any], width: int) -> Any:
        # Vectors of bytes cannot be shifted at once: what is above is had by subtracting, sixteen times too large.
        grouped = self._grouped(run, parts[0], width)
        below = run(aten.to.dtype, run(aten.bitwise_and.Scalar, grouped, 15), torch.float32)
        above = run(aten.sub.Tensor, run(aten.to.dtype, grouped, torch.float32), below)
        first, second = (run(aten.select.int, vector, 0, half) for half in (0, 1))
        met = (below, first), (above, run(aten.mul.Scalar, second, 1 / 16))
        scale = self._of_halves(run, parts[1])
        products = [
            run(aten.mul.Tensor, run(aten.mul.Tensor, *pair), run(aten.select.int, scale, 1, half))
            for half, pair in enumerate(met)
        ]
        above_least = run(aten.sum.dim_IntList, run(aten.add.Tensor, *products), [-2, -1])
        sums = run(aten.flatten.using_ints, run(aten.sum.dim_IntList, vector, [-1]), 0, -1)  # of each group
        least = run(aten.mul.Tensor, run(aten.to.dtype, parts[2], torch.float32), sums)
        return run(aten.add.Tensor, above_least, run(aten.sum.dim_IntList, least, [-1]))

    def _members(self, width: int) -> int:
        return math.gcd(width // 2, self.group)

    def _encoded(self, rows: Tensor) -> tuple[Tensor, ...]:
        width = rows.shape[1]
        groups = rows.unflatten(-1, (-1, self._members(width)))
        scale, least = self._best(groups)
        codes = _codes(groups, scale, least).flatten(-2).to(torch.uint8)
        below, above = codes.split(width // 2, dim=-1)
        return below | (above << 4), scale.squeeze(-1).to(torch.bfloat16), least.squeeze(-1).to(torch.bfloat16)

    def _best(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """For each group the span with the least error in squares."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        kept: tuple[Tensor, Tensor, Tensor] | None = None
        for span in SPANS:
            scale = ((high - low) * (span / 15)).clamp_min(LEAST_SCALE).to(torch.bfloat16).to(torch.float32)
            least = (low * span).to(torch.bfloat16).to(torch.float32)
            error = (_codes(groups, scale, least) * scale + least - groups).square().sum(-1, keepdim=True)
            if kept is None:
                kept = error, scale, least
            else:
                better = error < kept[0]
                kept = (*(torch.where(better, a, b) for a, b in zip((error, scale, least), kept, strict=True)),)  # type: ignore[assignment]
        assert kept is not None
        return kept[1], kept[2]

    def _grouped(self, run: Run, codes: Any, width: int) -> Any:
        """Bytes [N, G, M]."""
        return run(aten.unflatten.int, codes, -1, self.fold(width)[1:])

    def _of_halves(self, run: Run, part: Any) -> Any:
        """What the groups of both halves have of a part, as float32 [N, 2, G, 1]."""
        wide = run(aten.unflatten.int, run(aten.to.dtype, part, torch.float32), -1, [2, -1])
        return run(aten.unsqueeze.default, wide, -1)


def _codes(groups: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    return ((groups - least) / scale).round().clamp(0, 15)


@dataclass(frozen=True)
class CodedWeight:
    """A weight that lies in the graph as codes, and the model's own that it stands for."""

    name: str  # what the names of its parts begin with
    of: tuple[str, ...]  # names in the graph as it was captured; their rows lie behind each other
    dtype: WeightFormatName
    group: int | None
    turned: bool  # whether the model has [K, N]

    @property
    def format(self) -> WeightFormat:
        return weight_format(self.dtype, self.group)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its parts in the graph."""
        return tuple(f"{self.name}_{part}" for part in self.format.parts)

    def encode(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts, made of the model's own weights one by one."""
        made = [self.format.encode(one.detach().t() if self.turned else one.detach()) for one in weights]
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*made, strict=True))

    def numbers(self, parts: Sequence[Tensor]) -> int:
        """How many numbers its codes stand for."""
        codes = parts[0]
        return codes.numel() * (2 if codes.dtype is torch.uint8 else 1)

    def decoded(self, parts: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
        """What the model would have to have to say the same."""
        weight: Tensor = self.format.decode(NOW, parts, width).to(dtype)
        return weight.t() if self.turned else weight


def weight_format(dtype: WeightFormatName, group: int | None) -> WeightFormat:
    return FourBits(group or GROUP) if dtype == "int4" else EightBits()
