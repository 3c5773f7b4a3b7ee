"""Results for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from fxopt.bench.figures import Figures
from fxopt.bench.results import Results

Cell = Callable[[Figures], str]


def number(value: float | None, form: str = ".1f", unit: str = "") -> str:
    """What was not measured is left blank."""
    return "" if value is None else f"{value:{form}}{unit}"


#: What stands above a column, and what in it.
COLUMNS: dict[str, Cell] = {
    "ready\ns": lambda one: number(one.ready_s, ".0f"),
    "prefill\nms": lambda one: number(one.prefill_ms, ",.0f"),
    "decode\nms/token": lambda one: number(one.token_ms),
    "decode\ntokens/s": lambda one: number(one.decode_tok_s),
    "decode\nto stock": lambda one: number(one.decode_to_stock, ".2f", "x"),
    "overall\ntokens/s": lambda one: number(one.tok_s),
    "overall\nto stock": lambda one: number(one.to_stock, ".2f", "x"),
    "peak\nMB": lambda one: number(one.peak_mb, ",.0f"),
    "reads\nGB/s": lambda one: number(one.read_gb_s),
    "of the\nlimit": lambda one: number(one.of_read_speed, ".0%"),
    "\nhash": lambda one: one.text_hash,
    "same\ntokens": lambda one: said(one),
}

LEGEND = """\
prefill: until the first new token. decode: every token after it. overall: new tokens a second, prefill included.
to stock: median of the ratios of the rounds; all ran in turns. ready: preparation, compilation, first answer.
hash: sha256 of the decoded prompt and answer. same tokens: as stock eager, or up to which token."""


def said(one: Figures) -> str:
    """Whether the tokens are those of the stock model."""
    if one.agreed is None:
        return ""
    return "yes" if one.is_same else f"first {one.agreed}"


def compared(results: Results) -> str:
    """A table for each setting, with what one has to know to read it."""
    parts = [f"{results.model}, {results.dtype}\n{results.machine}"]
    for setting in results.settings:
        found = results.of_setting(setting)
        parts.append(f"{setting}\n\n{rows(found, COLUMNS)}")
        parts += troubles(found)
    return "\n\n".join([*parts, LEGEND + "\n" + limits(results), *_left_out(results)])


def rows(found: Sequence[Figures], columns: dict[str, Cell]) -> str:
    table: list[list[Any]] = [[one.contender, *(cell(one) for cell in columns.values())] for one in found]
    align = ["left", *["right"] * len(columns)]
    return tabulate(table, headers=["\ncontender", *columns], disable_numparse=True, colalign=align)


def troubles(found: Sequence[Figures]) -> list[str]:
    """Why there are blanks."""
    lines = [f"{one.contender}: {one.trouble}" for one in found if one.trouble is not None]
    return ["\n".join(lines)] if lines else []


def limits(results: Results) -> str:
    """Against what memory and bytes a second are to be read."""
    lines = []
    if results.memory is not None:
        lines.append(f"peak: {results.memory}, if this contender were alone: weights, what it keeps, and one run.")
    if results.read_gb_s is not None:
        lines.append(
            "reads: the bytes of all weights and of the filled cache, over the time of a decode step; "
            f"the limit is a plain\nread of memory, which ran at {results.read_gb_s:.1f} GB/s between the rounds."
        )
    return "\n".join(lines)


def _left_out(results: Results) -> list[str]:
    lines = [f"left out: {name}: {reason}" for name, reason in results.left_out.items()]
    return ["\n".join(lines)] if lines else []
