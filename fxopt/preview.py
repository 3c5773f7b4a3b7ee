"""``explain``: what would fxopt do to a model? From its config alone, in seconds, with no weights.

Nothing is computed, so nothing is verified or compiled.
"""

from __future__ import annotations

import torch

from fxopt.admission import Selection
from fxopt.choices import note_linears
from fxopt.lower import Backend
from fxopt.report import Report
from fxopt.specialise import Role
from fxopt.weightless import ModelSource, rewritten, uncollected


def explain(
    model: ModelSource,
    max_len: int | None = None,
    *,
    passes: Selection = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "inductor",
    batch: int = 1,
) -> Report:
    """The report of ``optimize`` without running anything.

    ``model`` is a config, a model (its config is taken), a folder, a ``config.json``, or "demo".
    """
    with uncollected():
        made = rewritten(model, max_len, passes, dtype=dtype, backend=backend, batch=batch)
        with made.progress.step("specialise"):
            made.specialised(Role("decode", 1 if batch == 1 else None, longest_step=1))
        note_linears(made.pipeline)
        report = made.pipeline.report(made.model)
        report.seconds = made.progress.seconds
        return report
