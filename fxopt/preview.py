"""``explain``: what would fxopt do to a model? From its config alone, in seconds, with no weights.

The model is made of fake tensors: shapes without memory. A 70B model is captured and rewritten on
a laptop; nothing is computed, so nothing is verified or compiled.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fxopt.admission import Selection, admit_request, select
from fxopt.capture import position_limit
from fxopt.errors import InvalidRequestError, first_line
from fxopt.lower import Backend
from fxopt.pipeline import Pipeline, Policy
from fxopt.progress import Progress
from fxopt.report import Report
from fxopt.request import Request
from fxopt.rewrite import Pass
from fxopt.specialise import Role
from fxopt.weights import pack

DEFAULT_LENGTH = 4096  # where the model can do as many


def explain(
    model: PretrainedConfig | PreTrainedModel | str | Path,
    max_len: int | None = None,
    *,
    passes: Selection = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "inductor",
    batch: int = 1,
) -> Report:
    """The report of ``optimize`` without running anything.

    ``model`` is a config, a model (its config is taken), a folder, or a ``config.json``.
    """
    with _uncollected():
        return _explained(_config(model), max_len, select(passes), dtype, backend, batch)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """A graph that only grows is walked by the collector again and again, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _explained(
    config: PretrainedConfig,
    max_len: int | None,
    selected: tuple[Pass[Any], ...],
    dtype: torch.dtype | None,
    backend: Backend,
    batch: int,
) -> Report:
    progress = Progress()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        with progress.step("make the model without weights"):
            fake = _made(config, dtype or getattr(config, "dtype", None) or torch.float32)
        length = max_len if max_len is not None else min(DEFAULT_LENGTH, position_limit(fake) or DEFAULT_LENGTH)
        request = Request(length, max_batch=batch, backend=backend, verify="off")
        admit_request(fake, request)
        with progress.step("capture"):
            captured = request.captured(fake)
    pipeline = Pipeline(selected, captured, Policy(batch=batch))
    with progress.step("rewrite"), mode:
        pipeline.run()
        pipeline.program = pack(pipeline.program)
        pipeline.specialised(Role("decode", 1 if batch == 1 else None, longest_step=1))
    report = pipeline.report(type(fake).__name__)
    report.seconds = progress.seconds
    return report


def _config(model: Any) -> PretrainedConfig:
    if isinstance(model, PreTrainedModel):
        return copy.deepcopy(model.config)  # transformers writes into the config that it makes a model from
    if isinstance(model, PretrainedConfig):
        return copy.deepcopy(model)
    if not isinstance(model, (str, Path)):
        raise InvalidRequestError(f"a {type(model).__name__} was given; give a config, a model, or where a config is")
    try:
        return AutoConfig.from_pretrained(str(model), trust_remote_code=False)
    except Exception as error:  # whatever is in the file
        raise InvalidRequestError(f"no config can be read from {model}: {first_line(error)}") from error


def _made(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidRequestError("the config is of a quantised model; only plain float weights are supported so far")
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # whatever the config holds
        raise InvalidRequestError(f"{type(config).__name__} is of no causal LM: {first_line(error)}") from error
