"""A report as plain data, with the graphs: lines that several stages share are written once."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fxopt.artifact.plain import expect, from_plain, to_plain, wrong
from fxopt.listing import NAME, Line, Listing
from fxopt.outcome import Outcome
from fxopt.report import Report


def report_data(report: Report) -> dict[str, Any]:
    numbers: dict[Line, int] = {}
    listings = [[numbers.setdefault(line, len(numbers)) for line in stage.listing] for stage in report.stages]
    bare = {field.name: getattr(report, field.name) for field in fields(report)}
    bare["stages"] = [replace(stage, listing=()) for stage in report.stages]
    lines = [[line.template, line.names, line.layer, line.source, line.value, line.made_by] for line in numbers]
    return {"report": to_plain(bare), "lines": to_plain(lines), "listings": listings}


def read_report(data: Any, where: str) -> Report:
    table = expect(dict, data, where)
    lines = [_line(line, f"{where}.lines") for line in expect(list, table.get("lines"), f"{where}.lines")]
    report: Report = from_plain(Report, table.get("report"), f"{where}.report")
    listings = expect(list, table.get("listings"), f"{where}.listings")
    if len(listings) != len(report.stages):
        wrong(f"{where}.listings", f"one list for each of {len(report.stages)} stages", len(listings))
    both = zip(report.stages, listings, strict=True)
    report.stages = [_with_listing(stage, numbers, lines, where) for stage, numbers in both]
    return report


def _with_listing(stage: Outcome, numbers: Any, lines: list[Line], where: str) -> Outcome:
    for number in expect(list, numbers, f"{where}.listings"):
        if type(number) is not int or not 0 <= number < len(lines):
            wrong(f"{where}.listings", "numbers of lines", number)
    listing: Listing = tuple(lines[number] for number in numbers)
    return replace(stage, listing=listing)


def _line(data: Any, where: str) -> Line:
    items = expect(list, data, where)
    if len(items) != 6:
        wrong(where, "six things about a line", items)
    template, names, layer, source, value, made_by = items
    kinds = [(str, template), (tuple[str, ...], names), (int | None, layer), (str, source), (str, value)]
    template, names, layer, source, value = (from_plain(kind, item, where) for kind, item in kinds)
    if not names or template.count(NAME) != len(names):
        wrong(where, "a line with its names", template)
    return Line(template, names, layer, source, value, from_plain(tuple[str, ...], made_by, where))
