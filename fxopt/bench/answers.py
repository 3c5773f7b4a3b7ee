"""What contenders said: one hash of it, and how far two agree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DIGITS = 8


def hashed(texts: Sequence[str]) -> str:
    """The first digits of the sha256 of the list of decoded sequences, as Python writes it."""
    return hashlib.sha256(str(list(texts)).encode()).hexdigest()[:DIGITS]


def agreed(tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> int:
    """How many tokens from the first on are the same in every sequence."""
    return min(_agreed(*pair) for pair in zip(tokens, wanted, strict=True))


def _agreed(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    pairs = zip(tokens, wanted, strict=True)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(wanted))
