"""Plain data that somebody may have edited: each value is what it should be, or a sentence says where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from fxopt.memory.errors import PlanError

LONGEST_NAME = 1000  # characters


def table(data: object, where: str, needed: set[str], possible: set[str]) -> dict[str, Any]:
    """A table that has all that is needed, and nothing that is unknown."""
    if not isinstance(data, dict):
        wrong(where, "a table", data)
    if missing := sorted(needed - data.keys()):
        raise PlanError(f"{where} has no {missing[0]!r}; add it, or plan again")
    if strange := [key for key in data if key not in needed | possible]:
        known = ", ".join(sorted(needed | possible))
        raise PlanError(f"{where} has {repr(strange[0])[:60]}, which means nothing there; known are {known}")
    return data


def named(data: object, where: str, most: int) -> dict[str, Any]:
    """A table whose keys are names."""
    if not isinstance(data, dict):
        wrong(where, "a table", data)
    if len(data) > most:
        raise PlanError(f"{where} has {len(data):,} entries; at most {most:,} are read")
    for name in data:
        text(name, f"a name in {where}")
    return data


def listed(data: object, where: str, least: int, most: int) -> list[Any]:
    """A list of a length that makes sense."""
    if not isinstance(data, list):
        wrong(where, "a list", data)
    if not least <= len(data) <= most:
        wanted = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        raise PlanError(f"{where} has {len(data):,} entries, and should have {wanted}")
    return data


def text(data: object, where: str) -> str:
    """A text of some length."""
    if not isinstance(data, str) or not 0 < len(data) <= LONGEST_NAME:
        wrong(where, f"a text of at most {LONGEST_NAME} characters", data)
    return data


def whole(data: object, where: str, least: int, most: int) -> int:
    """A whole number between two others."""
    if type(data) is not int or not least <= data <= most:
        wrong(where, f"a whole number from {least:,} to {most:,}", data)
    return data


def flag(data: object, where: str) -> bool:
    """True or false."""
    if not isinstance(data, bool):
        wrong(where, "true or false", data)
    return data


def one_of(known: Sequence[str], data: object, where: str) -> Any:
    """One of a few texts."""
    if not isinstance(data, str) or data not in known:
        wrong(where, f"one of {', '.join(known)}", data)
    return data


def wrong(where: str, wanted: str, data: object) -> NoReturn:
    raise PlanError(f"{where} should be {wanted}, and is {repr(data)[:60]}; mend it, or plan again")
