"""``fxopt plan``: where the activations of a model, or the buffers of a file, lie in one arena."""

from __future__ import annotations

import argparse
import functools
from typing import get_args

from fxopt.cli import plan_csv, plan_model
from fxopt.cli.options import Commands, add_config, add_passes, positive
from fxopt.memory.sets import Merge

HELP = "place activations in one arena, as small as it can be"

#: The flags that only one of the two forms has.
_OF_MODEL = ("max_len", "dtype", "batch", "shapes", "merge", "passes", "left_out", "added")
_OF_CSV = ("capacity",)


def add(commands: Commands) -> None:
    parser = commands.add_parser("plan", help=HELP, description=HELP)
    add_config(parser, nargs="?")
    parser.add_argument("--csv", metavar="FILE", help="buffers instead of a model: id,lower,upper,size[,alignment]")
    parser.add_argument("--out", metavar="FILE", help="write the plan: YAML, or the file again with a column offset")
    parser.add_argument("--svg", metavar="FILE", help="draw the plan")
    parser.add_argument("--budget", type=seconds, metavar="S", help="seconds to search: 5 a graph, 60 for a file")
    model = parser.add_argument_group("of a model")
    model.add_argument("--batch", type=positive, help="sequences where --shapes does not say it (default 1)")
    model.add_argument(
        "--shapes",
        action="append",
        metavar="GRAPH:AXIS=N,…",
        help="plan this graph for these sizes, e.g. prefill:step=128,window=512; may be given several times",
    )
    model.add_argument("--merge", choices=get_args(Merge), help="what the sets of a graph share (default tables)")
    file = parser.add_argument_group("of a file")
    file.add_argument("--capacity", type=positive, metavar="BYTES", help="any plan that fits in so much will do")
    add_passes(parser)
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.model is None and arguments.csv is None:
        parser.error("there is nothing to plan; give a MODEL, or buffers with --csv FILE")
    if arguments.model is not None and arguments.csv is not None:
        parser.error(f"MODEL {arguments.model} and --csv {arguments.csv} are two things to plan; give one of them")
    form, other = ("a MODEL", _OF_CSV) if arguments.csv is None else ("--csv", _OF_MODEL)
    if foreign := [name for name in other if getattr(arguments, name) is not None]:
        words = {"left_out": "--no-…", "added": "a pass that is added"}
        flag = words.get(foreign[0], f"--{foreign[0].replace('_', '-')}")
        parser.error(f"{flag} means nothing beside {form}; leave it out")
    return plan_csv.run(arguments) if arguments.csv is not None else plan_model.run(arguments)


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no time to search; give seconds above 0")
    return number
