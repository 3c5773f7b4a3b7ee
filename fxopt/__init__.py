"""fxopt: rewrite a Hugging Face causal LM's graph for static, fast generation."""

from fxopt.api import optimize
from fxopt.errors import (
    CaptureError,
    FxoptError,
    InvalidRequestError,
    LoweringError,
    RewriteError,
    VerificationError,
)
from fxopt.report import Report
from fxopt.rewrite import Pass

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "FxoptError",
    "InvalidRequestError",
    "LoweringError",
    "Pass",
    "Report",
    "RewriteError",
    "VerificationError",
    "__version__",
    "optimize",
]
