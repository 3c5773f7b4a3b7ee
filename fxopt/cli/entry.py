"""Which command it is, and what becomes of its errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxopt.cli import bench, bisect, demo, explain, generate, passes, plan, verify
from fxopt.errors import FxoptError

COMMANDS = (demo, generate, bench, explain, verify, bisect, plan, passes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one sentence and exit code 2."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (FxoptError, OSError) as error:
        print(f"fxopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxopt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxopt", description="The same tokens, faster, and you see what was done.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
