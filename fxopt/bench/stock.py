"""Contenders from Transformers itself: eager, and its two ways with torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from fxopt.bench.contender import Contender, Stamp, Tokens
from fxopt.bench.own_code import with_own_code
from fxopt.bench.subject import Subject
from fxopt.lower import Backend

STOCK = "stock eager"


class _Stamping(BaseStreamer):
    """Says when a token is there. ``generate`` hands in the prompt first."""

    def __init__(self, stamp: Stamp) -> None:
        self._stamp = stamp
        self._saw_prompt = False

    def put(self, value: Any) -> None:
        if self._saw_prompt:
            self._stamp()
        self._saw_prompt = True

    def end(self) -> None:
        pass


def generated(model: Any, prompt: Tensor, new: int, stamp: Stamp | None, **options: Any) -> Tokens:
    """What ``generate`` of Transformers' interface says; no token ends a sequence."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
        streamer=None if stamp is None else _Stamping(stamp),
        **options,
    )
    tokens: Tokens = output[:, prompt.shape[1] :].tolist()
    return tokens


class StockEager(Contender):
    """The model as it is: a cache that grows, one kernel after the other."""

    name = STOCK

    def prepare(self, subject: Subject) -> None:
        self._model = subject.model

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        return generated(self._model, prompt, new, stamp)


class DynamicCompiled(Contender):
    """torch.compile around the forward, with the cache that grows."""

    name = "DynamicCache + torch.compile"

    def __init__(self, backend: Backend = "inductor") -> None:
        self._backend = backend

    def prepare(self, subject: Subject) -> None:
        self._model = copy.copy(subject.model)
        self._model.forward = torch.compile(with_own_code(subject.model.forward), dynamic=True, backend=self._backend)

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        return generated(self._model, prompt, new, stamp)


class StaticCompiled(Contender):
    """A StaticCache, for which ``generate`` compiles the decode step, as it does by itself on a GPU."""

    name = "StaticCache + torch.compile"

    def __init__(self, backend: Backend = "inductor", *, fullgraph: bool = False) -> None:
        self._backend = backend
        self._fullgraph = fullgraph

    def prepare(self, subject: Subject) -> None:
        self._model = copy.copy(subject.model)  # which keeps its compiled forward to itself
        self._model.__call__ = with_own_code(subject.model.forward)  # what ``generate`` compiles
        self._max_len = subject.max_len
        self._caches: dict[int, Any] = {}
        recorded = subject.source.device.type == "cuda" and self._backend == "inductor"
        mode = "reduce-overhead" if recorded else "default"
        self._config = CompileConfig(fullgraph=self._fullgraph, mode=mode, backend=self._backend)
        self._config._compile_all_devices = True

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        options = {"past_key_values": self._empty(prompt.shape[0]), "compile_config": copy.copy(self._config)}
        return generated(self._model, prompt, new, stamp, **options)

    def release(self) -> None:
        self._caches.clear()

    def _empty(self, batch: int) -> Any:
        """The cache of the last call with this batch: recorded graphs are bound to its addresses."""
        if batch not in self._caches:
            self._caches[batch] = StaticCache(config=self._model.config, max_cache_len=self._max_len)
        self._caches[batch].reset()
        return self._caches[batch]
