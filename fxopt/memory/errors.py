"""The error of plans that cannot be used."""

from __future__ import annotations

from fxopt.errors import FxoptError


class PlanError(FxoptError, ValueError):
    """A memory plan is wrong: two buffers share bytes, one has no place, or its text is not a plan."""
