"""``fxopt plan --csv FILE``: where the buffers of a file in MiniMalloc's form lie in one arena."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from fxopt.errors import InvalidRequestError
from fxopt.memory import Plan, draw, plan, read_csv, write_csv
from fxopt.memory.planner import Solver
from fxopt.model_plan import quality, ratio
from fxopt.progress import Progress

BUDGET_S = 60.0

COMPARED: tuple[Solver, ...] = ("naive", "itrex", "executorch", "tflite", "greedy")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if there is no plan for the capacity, or none was found."""
    table = read_csv(_text(arguments.csv))
    with Progress().step(f"plan {len(table.rows)} buffers"):
        made = plan(table.problem, budget_s=arguments.budget or BUDGET_S, capacity=arguments.capacity)
    print(comparison(made))
    if arguments.capacity is not None and made.size > arguments.capacity:
        print(f"\nfxopt: {_too_small(made, arguments.capacity)}", file=sys.stderr)
        return 1
    if arguments.out:
        Path(arguments.out).write_text(write_csv(table, made), encoding="utf-8")
        print(f"offsets: {arguments.out}", file=sys.stderr)
    if arguments.svg:
        Path(arguments.svg).write_text(draw(made, Path(arguments.csv).name), encoding="utf-8")
        print(f"picture: {arguments.svg}", file=sys.stderr)
    return 0


def comparison(made: Plan) -> str:
    """The plan beside its lower bound and what other algorithms make of the problem."""
    rows: list[list[object]] = [["lower bound", made.lower_bound, 1.0, ""]]
    how = f"{quality(made)} ({made.maker}, {made.seconds:.2f} s)"
    rows.append(["this plan", made.size, ratio(made.size, made.lower_bound), how])
    for solver in COMPARED:
        size = plan(made.problem, solver).size
        rows.append([solver, size, ratio(size, made.lower_bound), ""])
    headers = ["", "bytes", "to bound", ""]
    text = tabulate(rows, headers=headers, tablefmt="simple", intfmt=",", floatfmt=("", "", ".3f", ""))
    return f"{text}\n\n{made.note}" if made.note else text


def _too_small(made: Plan, capacity: int) -> str:
    if made.proven > capacity:
        return f"{capacity:,} bytes are too few: {made.proven:,} are needed at least"
    return f"no plan for {capacity:,} bytes was found in the time, and none was ruled out; give more with --budget"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is no text file: {error.reason}") from error
