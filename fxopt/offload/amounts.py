"""Numbers of bytes as people write them: 8GiB, 200 MiB, 1.5GB."""

from __future__ import annotations

import re
from fractions import Fraction

from fxopt.errors import InvalidRequestError

UNITS = {"": 1, "B": 1, **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}, "kB": 1000}
UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def bytes_of(name: str, amount: object) -> int:
    """The bytes that an option called ``name`` asks for: a whole number, or text with a unit."""
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    match = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    found = int(Fraction(match[1]) * UNITS[match[2]]) if match is not None and match[2] in UNITS else 0
    if found < 1:
        raise InvalidRequestError(
            f'{name}={amount!r} is no number of bytes; give one above 0, or text such as "8GiB" or "200MiB"'
        )
    return found


def told(nbytes: int) -> str:
    """Bytes with a unit, for sentences."""
    power = min(4, max(0, (nbytes.bit_length() - 1) // 10))
    if power == 0:
        return f"{nbytes} B"
    return f"{nbytes / 1024**power:.3g} {'KMGT'[power - 1]}iB"
