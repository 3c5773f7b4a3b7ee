"""``fxopt explain MODEL``: what would be rewritten, from the config alone."""

from __future__ import annotations

import argparse

from fxopt.cli.options import Commands, add_config, add_passes, dtype_of, positive, save, selection
from fxopt.lower import BACKENDS
from fxopt.preview import explain

HELP = "what would fxopt do to a model? No weights, nothing is compiled"


def add(commands: Commands) -> None:
    parser = commands.add_parser("explain", help=HELP, description=HELP)
    add_config(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="inductor")
    parser.add_argument("--batch", type=positive, default=1, help="of the decode step that is costed (default 1)")
    parser.add_argument("--diff", metavar="PASS", help="print what one pass changes, instead of the report")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--save-report", metavar="FILE", help="write the report as .html, .json or .txt")
    add_passes(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    report = explain(
        arguments.model,
        arguments.max_len,
        passes=selection(arguments),
        dtype=dtype_of(arguments),
        backend=arguments.backend,
        batch=arguments.batch,
    )
    if arguments.diff:
        print(report.diff(arguments.diff))
    else:
        print(report.to_json() if arguments.json else report)
    if arguments.save_report:
        save(report, arguments.save_report)
    return 0
