"""The command line: ``fxopt demo``, ``generate``, ``bench``, ``explain``, ``verify`` and so on."""

from fxopt.cli.entry import main

__all__ = ["main"]
