"""``fxopt passes``: the catalogue."""

from __future__ import annotations

import argparse
import dataclasses

from tabulate import tabulate

from fxopt.cli.options import Commands, flag_of
from fxopt.registry import catalogue


def add(commands: Commands) -> None:
    commands.add_parser("passes", help="list every pass, in pipeline order").set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    rows = []
    for kind in catalogue():
        options = ", ".join(field.name for field in dataclasses.fields(kind()))  # type: ignore[arg-type]
        flag = "needed" if kind.required else flag_of(kind)
        rows.append([kind.name, kind.stage.value, kind.summary, options, flag])
    print(
        tabulate(rows, headers=["pass", "graph", "what it rewrites", "options", "leave out, or add"], tablefmt="simple")
    )
    return 0
