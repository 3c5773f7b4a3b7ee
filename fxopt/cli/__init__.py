"""The command line: ``fxopt demo``, ``generate``, ``explain``, ``verify``, ``bisect``, ``plan``, ``passes``."""

from fxopt.cli.entry import main

__all__ = ["main"]
