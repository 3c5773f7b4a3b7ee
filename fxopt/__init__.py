"""fxopt: rewrite a Hugging Face causal LM's graph for static, fast generation."""

from fxopt import dynamo_backend
from fxopt.api import optimize
from fxopt.culprit import Culprit, bisect
from fxopt.errors import (
    ArtifactError,
    CaptureError,
    FxoptError,
    InvalidRequestError,
    LoweringError,
    RewriteError,
    VerificationError,
)
from fxopt.loading import load
from fxopt.only import Only
from fxopt.preview import explain
from fxopt.registry import register, unregister
from fxopt.report import Report
from fxopt.rewrite import Pass, Stage
from fxopt.token_check import SameTokens, TokenCheck, verify
from fxopt.views import Miss

__version__ = "0.1.0"
__all__ = [
    "ArtifactError",
    "CaptureError",
    "Culprit",
    "FxoptError",
    "InvalidRequestError",
    "LoweringError",
    "Miss",
    "Only",
    "Pass",
    "Report",
    "RewriteError",
    "SameTokens",
    "Stage",
    "TokenCheck",
    "VerificationError",
    "__version__",
    "bisect",
    "dynamo_backend",
    "explain",
    "load",
    "optimize",
    "register",
    "unregister",
    "verify",
]
