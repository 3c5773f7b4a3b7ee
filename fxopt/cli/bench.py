"""``fxopt bench``: speed, memory and tokens beside the stock model and other programs."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fxopt.bench import growth
from fxopt.bench.chart import Panel
from fxopt.bench.configs import CONFIGS
from fxopt.bench.contender import Contender
from fxopt.bench.job import Job
from fxopt.bench.job import run as run_job
from fxopt.bench.lineup import CONTENDERS, USUAL, Ways, ablation, chosen
from fxopt.bench.measuring import Effort
from fxopt.bench.pictures import drawing
from fxopt.bench.results import Results
from fxopt.bench.series import Series
from fxopt.bench.setting import Setting, settings
from fxopt.bench.source import Source
from fxopt.bench.table import ABLATION, compared, grown
from fxopt.bench.traces import Traces
from fxopt.cli.options import DTYPES, Commands, add_passes, positive, selection
from fxopt.demo_model import DEMO, is_demo_installed
from fxopt.lower import BACKENDS, COMPILES

HELP = "how fast, in how much memory, and whether the tokens are the same"
SMALL = "smollm2-135m"  # as large as the demo model, with random weights
BATCH, PROMPT, NEW = 1, 200, 64

_SIZES = ("batch", "prompt", "new", "max_len")

#: What is measured, contenders, how results are shown, and what is drawn of them.
Question = tuple[
    Sequence[Series],
    Callable[[], Sequence[Contender]],
    Callable[[Results], str],
    Callable[[Results], Sequence[Panel]] | None,
]


def add(commands: Commands) -> None:
    parser = commands.add_parser("bench", help=HELP, description=HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help='a folder or name for from_pretrained, or "demo" (default, if it is installed)')
    which.add_argument("--config", choices=tuple(CONFIGS), help="random weights in the shape of a known model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="default: the GPU if there is one")
    _add_sizes(parser)
    what = parser.add_argument_group("another question").add_mutually_exclusive_group()
    what.add_argument("--ablate", action="store_true", help="what each pass is worth: one row for each that is added")
    what.add_argument(
        "--growth",
        nargs="*",
        choices=growth.NAMES,
        metavar="AXIS",
        help=f"how costs grow, the sizes of an axis in turns: {', '.join(growth.NAMES)} (default: all of them)",
    )
    taking = parser.add_argument_group("who takes part")
    taking.add_argument(
        "--contenders", nargs="+", choices=tuple(CONTENDERS), metavar="NAME", help=f"of {', '.join(CONTENDERS)}"
    )
    taking.add_argument("--backend", choices=BACKENDS, default="inductor")
    taking.add_argument("--compile", nargs="+", choices=COMPILES, default=["auto"], help="fxopt, in one way or several")
    effort = parser.add_argument_group("effort")
    effort.add_argument(
        "--rounds", type=positive, default=Effort.rounds, help=f"timed runs of each (default {Effort.rounds})"
    )
    effort.add_argument(
        "--warmups", type=positive, default=Effort.warmups, help=f"runs before them (default {Effort.warmups})"
    )
    effort.add_argument("--threads", type=positive, help="default: as many as PyTorch takes")
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, metavar="FILE", help="add a line for each row, with versions and commit")
    output.add_argument("--svg", type=Path, metavar="FILE", help="draw a sweep, or --growth")
    output.add_argument("--profile", action="store_true", help="traces of short runs for TensorBoard, in ./tb_logs")
    add_passes(parser)
    parser.set_defaults(run=functools.partial(run, parser))


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("sizes; several of a kind make a sweep")
    size.add_argument("--batch", type=positive, nargs="+", metavar="N", help=f"sequences (default {BATCH})")
    size.add_argument("--prompt", type=positive, nargs="+", metavar="N", help=f"tokens of each (default {PROMPT})")
    size.add_argument("--new", type=positive, nargs="+", metavar="N", help=f"new tokens of each (default {NEW})")
    size.add_argument("--max-len", type=positive, metavar="N", help="of the caches (default: what is needed)")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _refuse(parser, arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    source, ways = source_of(arguments), Ways(selection(arguments), arguments.backend, arguments.compile)
    question = _growth if arguments.growth is not None else _ablation if arguments.ablate else _comparison
    wanted, lineup, shown, drawn = question(arguments, source, ways)
    effort = Effort(arguments.rounds, arguments.warmups)
    traces = Traces() if arguments.profile else None
    return run_job(Job(source, wanted, lineup, effort, shown, drawn, arguments.csv, arguments.svg, traces))


def source_of(arguments: argparse.Namespace) -> Source:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype)
    if arguments.config is not None:
        return Source(arguments.config, True, dtype, device)
    if arguments.model is not None or is_demo_installed():
        return Source(arguments.model or DEMO, False, dtype, device)
    return Source(SMALL, True, dtype, device)


def _comparison(arguments: argparse.Namespace, source: Source, ways: Ways) -> Question:
    wanted = _sizes(arguments)
    lineup = functools.partial(chosen, arguments.contenders or USUAL, ways)
    return [Series(wanted)], lineup, compared, drawing(wanted)


def _ablation(arguments: argparse.Namespace, source: Source, ways: Ways) -> Question:
    wanted = _sizes(arguments)
    shown = functools.partial(compared, columns=ABLATION)
    return [Series(wanted)], functools.partial(ablation, ways), shown, drawing(wanted)


def _growth(arguments: argparse.Namespace, source: Source, ways: Ways) -> Question:
    named = arguments.growth or growth.NAMES
    axes = [axis for axis in growth.axes(source.most_positions) if axis.name in named]
    lineup = functools.partial(chosen, arguments.contenders or USUAL, ways)
    shown = functools.partial(grown, axes=axes)
    return [axis.series for axis in axes], lineup, shown, lambda results: [axis.panel(results) for axis in axes]


def _sizes(arguments: argparse.Namespace) -> list[Setting]:
    given = (arguments.batch or [BATCH], arguments.prompt or [PROMPT], arguments.new or [NEW])
    return settings(*given, arguments.max_len)


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Flags that another one makes meaningless."""
    sizes = [name for name in _SIZES if getattr(arguments, name) is not None]
    if arguments.growth is not None and sizes:
        parser.error(f"--growth chooses its sizes itself; leave --{sizes[0].replace('_', '-')} out")
    if arguments.ablate and arguments.contenders is not None:
        parser.error("--ablate compares the passes of fxopt; leave --contenders out")
    if arguments.ablate and len(arguments.compile) > 1:
        parser.error("--ablate compiles in one way; give one --compile")
