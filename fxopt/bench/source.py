"""Where a model comes from: a known config with random weights, or what ``from_pretrained`` takes."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from fxopt.bench.configs import known_config, with_layers
from fxopt.demo_model import load_config, load_model
from fxopt.errors import InvalidRequestError, first_line
from fxopt.offload.amounts import told


@dataclass(frozen=True)
class Source:
    """A model that can be made, also with another depth, which then has random weights."""

    name: str
    random: bool  # whether the name is one of CONFIGS
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.name} (random weights)" if self.random else self.name

    @cached_property
    def config(self) -> PretrainedConfig:
        return known_config(self.name) if self.random else load_config(self.name)

    @property
    def most_positions(self) -> int | None:
        """The longest prompt and answer together, if the config sets a limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def load(self, layers: int | None = None) -> tuple[Any, Any]:
        """The model, and its tokenizer if it has one."""
        try:
            if layers is not None:
                return self._made(with_layers(self.config, layers)), None
            if self.random:
                return self._made(copy.deepcopy(self.config)), None  # Transformers writes into it
            # Loaders draw bars of their own, also into a pipe.
            transformers_logging.disable_progress_bar()
            with contextlib.redirect_stderr(io.StringIO()):
                model, tokenizer = load_model(self.name, self.dtype)
            return model.to(self.device), tokenizer
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(f"{self.name} cannot be loaded to {self.device}: {first_line(error)}") from error

    def _made(self, config: PretrainedConfig) -> Any:
        """Random weights, made where they will lie, the same ones every time."""
        self._check_room(config)
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu), self.device:
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def _check_room(self, config: PretrainedConfig) -> None:
        """A system that runs out of memory may kill the process without a word."""
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config, dtype=self.dtype).parameters()
        needed, free = sum(one.nbytes for one in parameters), free_bytes(self.device)
        if free is not None and needed > free:
            raise InvalidRequestError(
                f"the weights of {self.name} in {str(self.dtype).removeprefix('torch.')} take {told(needed)}, and "
                f"{told(free)} are free on {self.device}; take a smaller config, or a smaller dtype"
            )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had, if the system says so."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
