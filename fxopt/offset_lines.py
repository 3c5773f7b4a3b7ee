"""Where buffers lie, as lines of Python that compute it from the sizes when the code runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch._inductor.codegen.wrapper import pexpr

from fxopt.memory import MemoryPlan
from fxopt.memory.problem import ALIGN, rounded


@dataclass(frozen=True)
class OffsetLines:
    """The offset of each buffer, the bytes of the arena, and the lines that compute what in them is no number."""

    offsets: dict[str, sympy.Expr]
    total: int | str
    lines: tuple[str, ...]


def offset_lines(planned: MemoryPlan) -> OffsetLines:
    """A plan with ``merge="order"`` for any sizes: a buffer lies on the highest of what is below it."""
    assert planned.order is not None
    assert planned.symbolic is not None
    sizes = {buffer.name: sympy.sympify(buffer.nbytes) for buffer in planned.symbolic.buffers}
    tops: list[int | str] = []
    offsets: dict[str, sympy.Expr] = {}
    lines: list[str] = []

    def named(name: str, value: int | str) -> int | str:
        if isinstance(value, int) or value.isidentifier():
            return value
        lines.append(f"{name} = {value}")
        return name

    for number, (buffer, lows) in enumerate(zip(planned.order.names, planned.order.below, strict=True)):
        under = named(f"at{number}", _highest([tops[low] for low in lows]))
        exact = sympy.Integer if isinstance(under, int) else sympy.Symbol
        offsets[buffer] = exact(under)
        tops.append(named(f"top{number}", _above(under, sizes[buffer])))
    return OffsetLines(offsets, _highest(tops), tuple(lines))


def _above(under: int | str, size: sympy.Expr) -> int | str:
    """The first free byte above a buffer."""
    if size.is_number:
        taken = rounded(int(size), ALIGN)
        return under + taken if isinstance(under, int) else f"{under} + {taken}"
    in_lines = all(factor % ALIGN == 0 for factor in sympy.expand(size).as_coefficients_dict().values())
    text = pexpr(size) if in_lines else f"({pexpr(size)} + {ALIGN - 1} & -{ALIGN})"
    return text if under == 0 else f"{under} + {text}"


def _highest(tops: Sequence[int | str]) -> int | str:
    """The largest of numbers and names, as a number if it is one."""
    names = list(dict.fromkeys(top for top in tops if isinstance(top, str)))
    number = max((top for top in tops if isinstance(top, int)), default=0)
    if not names:
        return number
    parts = [*names, *([str(number)] if number else [])]
    return parts[0] if len(parts) == 1 else f"max({', '.join(parts)})"
