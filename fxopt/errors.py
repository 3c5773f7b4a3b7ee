"""The errors that users see. Each is a sentence: what was asked, what was found, what to do."""

from __future__ import annotations


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


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that PyTorch may add."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
