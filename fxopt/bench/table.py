"""Results for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tabulate import SEPARATING_LINE, tabulate

from fxopt.bench.figures import Figures
from fxopt.bench.growth import Axis
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
    "decode\nto stock": lambda one: number(one.decode_to_stock, ".2f", "x"),
    "overall\ntokens/s": lambda one: number(one.tok_s),
    "overall\nto stock": lambda one: number(one.to_stock, ".2f", "x"),
    "peak\nMB": lambda one: number(one.peak_mb, ",.0f"),
    "reads\nGB/s": lambda one: number(one.read_gb_s),
    "of the\nlimit": lambda one: number(one.of_read_speed, ".0%"),
    "hash": lambda one: one.text_hash,
    "same\ntokens": lambda one: said(one),
}

#: Of passes that are added one by one; how each of them compares with the row above.
ABLATION: dict[str, Cell] = {
    "prefill\nms": COLUMNS["prefill\nms"],
    "decode\nms/token": COLUMNS["decode\nms/token"],
    "decode\nto above": lambda one: number(one.decode_to_before, ".2f", "x"),
    "decode\nto stock": COLUMNS["decode\nto stock"],
    "overall\ntokens/s": COLUMNS["overall\ntokens/s"],
    "overall\nto above": lambda one: number(one.to_before, ".2f", "x"),
    "overall\nto stock": COLUMNS["overall\nto stock"],
    "peak\nMB": COLUMNS["peak\nMB"],
    "hash": COLUMNS["hash"],
    "same\ntokens": COLUMNS["same\ntokens"],
}

#: What a column means, for tables that have it.
LEGEND = {
    "ready\ns": "ready: preparation, compilation and the first answer, with nothing compiled before.",
    "prefill\nms": "prefill: until the first new token. decode: the tokens after it.",
    "overall\ntokens/s": "overall: new tokens of all sequences, from the prompt to the last one.",
    "decode\nto stock": "to stock: how many times as fast; all ran in turns, and this is the median of the rounds.",
    "decode\nto above": "to above: the same, to the row above.",
    "peak\nMB": "peak: {memory}, if this contender were alone: weights, what it keeps, and one run.",
    "reads\nGB/s": "reads: all weights and the filled cache, in the time of a decode step.",
    "of the\nlimit": (
        "limit: a plain read of memory in the same round, {limit} GB/s in the median; the share is the median of the "
        "rounds."
    ),
    "hash": "hash: sha256 of the decoded prompts and answers.",
    "same\ntokens": "same tokens: as those of stock eager, or up to which one.",
}


def said(one: Figures) -> str:
    """Whether the tokens are those of the stock model."""
    if one.agreed is None:
        return ""
    return "yes" if one.is_same else f"first {one.agreed}"


def compared(results: Results, columns: dict[str, Cell] = COLUMNS) -> str:
    """A table for each setting, with what one has to know to read it; columns that nobody filled are left out."""
    columns = {name: cell for name, cell in columns.items() if any(map(cell, results.figures))}
    parts = [heading(results)]
    for setting in results.settings:
        found = results.of_setting(setting)
        table = [[one.contender, *(cell(one) for cell in columns.values())] for one in found]
        parts += [f"{setting}\n\n{_tabulated(table, ['contender', *columns])}", *_troubles(found)]
    return "\n\n".join([*parts, _legend(results, columns), *_left_out(results)])


def grown(results: Results, axes: Sequence[Axis]) -> str:
    """A table for each axis: what each contender takes for each size, and how many times what the first one takes."""
    parts = [heading(results)]
    for axis in axes:
        found = axis.figures(results)
        columns = _growth_columns(axis)
        names = dict.fromkeys(one.contender for one in found)
        ordered = [one for name in names for one in found if one.contender == name]
        table = [[one.contender, *(cell(one) for cell in columns.values())] for one in ordered]
        parts += [f"{axis.title}\n\n{_tabulated(table, ['contender', *columns])}", *_troubles(found)]
        parts.append(_growth_legend(axis, results.without_turns.get(axis.name)))
    return "\n\n".join([*parts, *_left_out(results)])


def _growth_columns(axis: Axis) -> dict[str, Cell]:
    first = f"{axis.size_of(axis.settings[0]):,}"
    columns: dict[str, Cell] = {axis.x: lambda one: f"{axis.size_of(one.setting):,}"}
    if axis.is_about_getting_ready:
        columns["ready\ns"] = lambda one: number(axis.value(one))
        columns[f"ready, times as\nlong as with {first}"] = lambda one: number(one.ready_to_first, ".2f", "x")
    columns["decode\nms/token"] = COLUMNS["decode\nms/token"]
    columns[f"decode, times as\nlong as with {first}"] = lambda one: number(one.step_to_first, ".2f", "x")
    return columns


def _growth_legend(axis: Axis, without_turns: str | None) -> str:
    first = f"{axis.size_of(axis.settings[0]):,}"
    how = "all sizes ran in turns in each round"
    if without_turns is not None:
        how = "sizes ran one after the other, so a machine that drifts looks like growth"
    told = [f"times as long as with {first}: the median of the rounds; {how}."]
    if without_turns is not None:
        told.append(f"no turns: the sizes did not fit into memory at once; {without_turns}")
    if axis.is_about_getting_ready:
        told.append(
            "ready: preparation, compilation and the first answer, with nothing compiled before; measured once."
        )
    return "\n".join(told)


def heading(results: Results) -> str:
    return f"{results.model}, {results.dtype}\n{results.machine}"


def _tabulated(table: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Names to the left, figures to the right; headers may have two lines, the last ones side by side."""
    height = 1 + max(header.count("\n") for header in headers)
    split = [[""] * (height - 1 - header.count("\n")) + header.split("\n") for header in headers]
    # Headers as rows: as headers, tabulate would give each column more room than a terminal has.
    rows = [*map(list, zip(*split, strict=True)), SEPARATING_LINE, *table]
    return tabulate(rows, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])


def _troubles(found: Sequence[Figures]) -> list[str]:
    """Why there are blanks."""
    lines = [f"{one.contender}, {one.setting}: {one.trouble}" for one in found if one.trouble is not None]
    return ["\n".join(lines)] if lines else []


def _legend(results: Results, columns: Iterable[str]) -> str:
    """A line for each column that is there."""
    found = [LEGEND[name] for name in LEGEND if name in columns]
    return "\n".join(one.format(memory=results.memory, limit=number(results.read_gb_s)) for one in found)


def _left_out(results: Results) -> list[str]:
    lines = [f"left out: {name}, {reason}" for name, reason in results.left_out.items()]
    return ["\n".join(lines)] if lines else []
