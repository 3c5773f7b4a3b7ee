"""A model without weights, captured and rewritten: fake tensors have shapes and no memory.

A config is enough, and a 70B model fits into a laptop. Nothing is computed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fxopt.admission import Selection, admit_request, select
from fxopt.capture import position_limit
from fxopt.demo_model import load_config
from fxopt.errors import InvalidRequestError, first_line
from fxopt.lower import Backend
from fxopt.pipeline import Pipeline, Policy
from fxopt.program import Program
from fxopt.progress import Progress
from fxopt.request import Request
from fxopt.specialise import Role
from fxopt.weights import pack

DEFAULT_LENGTH = 4096  # where the model can do as many

#: A config, a model (its config is taken), a folder, a ``config.json``, or a name.
ModelSource: TypeAlias = "PretrainedConfig | PreTrainedModel | str | Path"


@dataclass(frozen=True)
class Weightless:
    """A rewritten model that can be specialised, and what that took."""

    model: str  # its class
    pipeline: Pipeline
    mode: FakeTensorMode
    progress: Progress

    def specialised(self, role: Role) -> Program:
        """The graph of a role."""
        with self.mode:
            return self.pipeline.specialised(role)


def rewritten(
    model: ModelSource,
    max_len: int | None,
    passes: Selection,
    *,
    dtype: torch.dtype | None,
    backend: Backend,
    batch: int,
) -> Weightless:
    """The symbolic graph of a model after all passes on it; dtype and length are by default what its config says."""
    selected, config, progress = select(passes), _config(model), Progress()
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
    return Weightless(type(fake).__name__, pipeline, mode, progress)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A graph that only grows is walked by the collector again and again, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _config(model: Any) -> PretrainedConfig:
    if isinstance(model, PreTrainedModel):
        return copy.deepcopy(model.config)  # transformers writes into the config that it makes a model from
    if isinstance(model, PretrainedConfig):
        return copy.deepcopy(model)
    if not isinstance(model, (str, Path)):
        raise InvalidRequestError(f"a {type(model).__name__} was given; give a config, a model, or where a config is")
    try:
        return load_config(str(model))
    except Exception as error:  # whatever is in the file
        raise InvalidRequestError(f"no config can be read from {model}: {first_line(error)}") from error


def _made(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidRequestError("the config is of a quantised model; only plain float weights are supported so far")
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # whatever the config holds
        raise InvalidRequestError(f"{type(config).__name__} is of no causal LM: {first_line(error)}") from error
