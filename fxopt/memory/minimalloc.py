"""The CSV files of MiniMalloc: ``id,lower,upper,size[,alignment]``, and ``offset`` when solved.

Lifetimes are half-open, an alignment concerns the offset only, and other columns are carried along.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from fxopt.errors import InvalidRequestError
from fxopt.memory.planner import Plan
from fxopt.memory.problem import Buffer, Problem

ID, LOWER, UPPER, SIZE, ALIGNMENT, OFFSET = "id", "lower", "upper", "size", "alignment", "offset"
_NUMBERS = (LOWER, UPPER, SIZE)


@dataclass(frozen=True)
class Table:
    """The rows of a file as they were, and the problem that they state."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    problem: Problem


def read_csv(text: str) -> Table:
    """Read a problem; sentences say which line is wrong."""
    reader = csv.DictReader(io.StringIO(text), strict=True, skipinitialspace=True)
    columns = tuple(reader.fieldnames or ())
    if missing := [name for name in (ID, *_NUMBERS) if name not in columns]:
        raise InvalidRequestError(f"the file has no column {missing[0]!r}; it needs {ID}, {', '.join(_NUMBERS)}")
    if len(set(columns)) < len(columns):
        raise InvalidRequestError(f"two columns of the file have one name: {', '.join(columns)}")
    rows: list[dict[str, str]] = []
    buffers = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InvalidRequestError(
                    f"line {reader.line_num} has not {len(columns)} fields, as the first line has"
                )
            rows.append(row)
            buffers.append(_buffer(row, reader.line_num))
    except csv.Error as error:
        raise InvalidRequestError(f"line {reader.line_num} is no CSV: {error}") from None
    return Table(columns, tuple(rows), Problem(buffers))


def write_csv(table: Table, plan: Plan) -> str:
    """The file again, with the offset of each buffer; one without bytes lies at 0."""
    out = io.StringIO()
    columns = (*(name for name in table.columns if name != OFFSET), OFFSET)
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        writer.writerow({**row, OFFSET: plan.offsets.get(row[ID], 0)})
    return out.getvalue()


def _buffer(row: dict[str, str], line: int) -> Buffer:
    align = _number(row, ALIGNMENT, line) if row.get(ALIGNMENT) else 1
    start, end, nbytes = (_number(row, name, line) for name in _NUMBERS)
    return Buffer(row[ID], start, end, nbytes, align, padded=False)


def _number(row: dict[str, str], column: str, line: int) -> int:
    try:
        return int(row[column])
    except ValueError:
        raise InvalidRequestError(f"line {line}: {column} is {row[column][:40]!r}; give a whole number") from None
