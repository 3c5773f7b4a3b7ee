"""The error of weights that cannot be read, or not be put where they were to go."""

from __future__ import annotations

from fxopt.errors import FxoptError


class StoreError(FxoptError, OSError):
    """Weights in a store cannot be had: the disk is full, a file was changed or cut short, a reader has failed."""
