"""``fxopt bench``: speed, memory and tokens beside the stock model and other programs."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

from fxopt.bench import records
from fxopt.bench.configs import CONFIGS
from fxopt.bench.lineup import CONTENDERS, USUAL, Ways, chosen
from fxopt.bench.machine import Machine
from fxopt.bench.measuring import Effort, Measuring
from fxopt.bench.results import Results
from fxopt.bench.setting import settings
from fxopt.bench.source import Source
from fxopt.bench.table import compared
from fxopt.bench.traces import Traces
from fxopt.cli.options import DTYPES, Commands, add_passes, positive, selection
from fxopt.demo_model import DEMO, is_demo_installed
from fxopt.lower import BACKENDS, COMPILES
from fxopt.progress import Progress

HELP = "how fast, in how much memory, and whether the tokens are the same"
INTERRUPTED = 130
SMALL = "smollm2-135m"  # as large as the demo model, with random weights


def add(commands: Commands) -> None:
    parser = commands.add_parser("bench", help=HELP, description=HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help='a folder or name for from_pretrained, or "demo" (default, if it is installed)')
    which.add_argument("--config", choices=tuple(CONFIGS), help="random weights in the shape of a known model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="default: the GPU if there is one")
    size = parser.add_argument_group("sizes; several of a kind make a sweep")
    size.add_argument("--batch", type=positive, nargs="+", default=[1], help="sequences (default 1)")
    size.add_argument("--prompt", type=positive, nargs="+", default=[200], help="tokens of each (default 200)")
    size.add_argument("--new", type=positive, nargs="+", default=[64], help="new tokens of each (default 64)")
    size.add_argument("--max-len", type=positive, help="of the caches (default: what the longest setting needs)")
    effort = parser.add_argument_group("effort")
    effort.add_argument("--rounds", type=positive, default=3, help="timed runs of every contender (default 3)")
    effort.add_argument("--warmups", type=positive, default=1, help="runs before them (default 1)")
    effort.add_argument("--threads", type=positive, help="default: as many as PyTorch takes")
    taking = parser.add_argument_group("who takes part")
    taking.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(USUAL), metavar="NAME")
    taking.add_argument("--backend", choices=BACKENDS, default="inductor")
    taking.add_argument("--compile", nargs="+", choices=COMPILES, default=["auto"], help="fxopt, in one way or several")
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, metavar="FILE", help="add a line for each row, with versions and commit")
    output.add_argument("--profile", action="store_true", help="traces of short runs for TensorBoard, in ./tb_logs")
    add_passes(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    wanted = settings(arguments.batch, arguments.prompt, arguments.new, arguments.max_len)
    if arguments.csv is not None:
        records.check(arguments.csv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    ways = Ways(selection(arguments), arguments.backend, arguments.compile)
    source = source_of(arguments)
    machine = Machine.here(source.device)
    measuring = Measuring(
        source,
        functools.partial(chosen, arguments.contenders, ways),
        Effort(arguments.rounds, arguments.warmups),
        Progress(),
        Traces() if arguments.profile else None,
    )
    interrupted = False
    try:
        measuring.run(wanted)
    except KeyboardInterrupt:
        interrupted = True
    results = Results.of(measuring, machine)
    print(compared(results))
    if arguments.csv is not None:
        records.append(arguments.csv, results)
        print(f"csv: {arguments.csv}", file=sys.stderr)
    if interrupted:
        print("fxopt: interrupted; this is what was measured until then", file=sys.stderr)
        return INTERRUPTED
    return 0


def source_of(arguments: argparse.Namespace) -> Source:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype)
    if arguments.config is not None:
        return Source(arguments.config, True, dtype, device)
    if arguments.model is not None or is_demo_installed():
        return Source(arguments.model or DEMO, False, dtype, device)
    return Source(SMALL, True, dtype, device)
