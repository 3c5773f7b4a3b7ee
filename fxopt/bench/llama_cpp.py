"""llama.cpp as a contender, through llama-cpp-python."""

from __future__ import annotations

import itertools
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fxopt.bench.contender import Contender, Stamp, Tokens
from fxopt.bench.gguf_files import file_of, why_no_file
from fxopt.bench.setting import Setting
from fxopt.bench.subject import Subject

#: What ggml calls the dtype of keys and values.
_CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


class LlamaCpp(Contender):
    """Weights, keys and values in the dtype of the others."""

    name = "llama.cpp"
    shares_weights = False

    def why_not(self, subject: Subject, setting: Setting) -> str | None:
        if missing := [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]:
            return f'{missing[0]} is not installed; pip install "fxopt[peers]"'
        if setting.batch > 1:
            return "its Python interface takes one sequence at a time"
        return why_no_file(subject.source, subject.source.dtype)

    def prepare(self, subject: Subject) -> None:
        from llama_cpp import Llama

        dtype, threads = subject.source.dtype, torch.get_num_threads()
        self._scratch = tempfile.TemporaryDirectory()
        self._llama = Llama(
            str(file_of(subject.source, dtype, Path(self._scratch.name))),
            n_ctx=subject.max_len,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if subject.source.device.type == "cuda" else 0,
            type_k=_CACHE_TYPES[dtype],
            type_v=_CACHE_TYPES[dtype],
            verbose=False,
        )

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        self._llama.reset()  # or it would find the prompt in its cache
        tokens = []
        endless = self._llama.generate(prompt[0].tolist(), temp=0.0, repeat_penalty=1.0)
        for token in itertools.islice(endless, new):
            if stamp is not None:
                stamp()
            tokens.append(token)
        return [tokens]
