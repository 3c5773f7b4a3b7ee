"""The error of weights, or rows of a cache, that cannot be read, or not be put where they were to go."""

from __future__ import annotations

from fxopt.errors import FxoptError


class StoreError(FxoptError, OSError):
    """What is in a store cannot be had: the disk is full, a file was changed or cut short, a reader has failed."""
