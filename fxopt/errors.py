"""The errors that users see. Each is a sentence: what was asked, what was found, what to do."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class FxoptError(Exception):
    """Anything fxopt refuses or fails to do; the stock model is as it was before."""


class InvalidRequestError(FxoptError, ValueError):
    """The request cannot be served; nothing was started."""


class CaptureError(FxoptError, RuntimeError):
    """The model could not be captured as one graph."""


class RewriteError(FxoptError, RuntimeError):
    """A pass that cannot be left out was refused, or a pass failed under ``strict=True``."""


class LoweringError(FxoptError, RuntimeError):
    """The compiler failed on a rewritten graph."""


class VerificationError(FxoptError, RuntimeError):
    """A rewritten graph does not compute what the stock model computes."""


class CaptureDiffersError(VerificationError):
    """The graph was wrong before any pass had touched it."""


class CacheMemoryError(FxoptError, MemoryError):
    """There is no memory for one more cache; those that are held go on working."""


class ArtifactError(FxoptError, ValueError):
    """A saved folder cannot be loaded: it is damaged, foreign, or made for something else."""


#: Packages that stand between a user's line and the place where a warning is given.
_BETWEEN = {"fxopt", "torch", "transformers", "contextlib"}


def warn(sentence: str) -> None:
    """A warning that points at the user's line, however deep below it the reason was found."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame) in _BETWEEN:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(sentence, stacklevel=depth + 1)  # level 1 is this function itself


def _package(frame: FrameType) -> str:
    """Of the code of a frame; code that PyTorch has written may have no name."""
    return str(frame.f_globals.get("__name__") or "torch").partition(".")[0]


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that PyTorch may add."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
