"""``fxopt plan``: where buffers lie in one arena."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from fxopt.cli.options import Commands, positive
from fxopt.errors import InvalidRequestError
from fxopt.memory import Plan, draw, plan, read_csv, write_csv
from fxopt.progress import Progress

HELP = "place buffers in one arena, as small as it can be"

COMPARED = ("naive", "itrex", "executorch", "tflite", "greedy")


def add(commands: Commands) -> None:
    parser = commands.add_parser("plan", help=HELP, description=HELP)
    parser.add_argument("--csv", metavar="FILE", required=True, help="buffers: id,lower,upper,size[,alignment]")
    parser.add_argument("--out", metavar="FILE", help="the same with a column offset; without it nothing is written")
    parser.add_argument("--capacity", type=positive, metavar="BYTES", help="any plan that fits in so much will do")
    parser.add_argument("--budget", type=seconds, default=60.0, metavar="S", help="seconds to search (default 60)")
    parser.add_argument("--svg", metavar="FILE", help="draw the plan")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if there is no plan for the capacity, or none was found."""
    table = read_csv(_text(arguments.csv))
    with Progress().step(f"plan {len(table.rows)} buffers"):
        made = plan(table.problem, budget_s=arguments.budget, capacity=arguments.capacity)
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
    quality = made.status if made.status == "optimal" else f"feasible, at most {made.gap:.2%} too large"
    rows.append(["this plan", made.size, _ratio(made, made.size), f"{quality} ({made.maker}, {made.seconds:.2f} s)"])
    for solver in COMPARED:
        size = plan(made.problem, solver).size  # type: ignore[arg-type]
        rows.append([solver, size, _ratio(made, size), ""])
    headers = ["", "bytes", "to bound", ""]
    text = tabulate(rows, headers=headers, tablefmt="simple", intfmt=",", floatfmt=("", "", ".3f", ""))
    return f"{text}\n\n{made.note}" if made.note else text


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no time to search; give seconds above 0")
    return number


def _ratio(made: Plan, size: int) -> float:
    return size / made.lower_bound if made.lower_bound else 1.0


def _too_small(made: Plan, capacity: int) -> str:
    if made.proven > capacity:
        return f"{capacity:,} bytes are too few: {made.proven:,} are needed at least"
    return f"no plan for {capacity:,} bytes was found in the time, and none was ruled out; give more with --budget"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is no text file: {error.reason}") from error
