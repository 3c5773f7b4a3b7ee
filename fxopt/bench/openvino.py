"""OpenVINO GenAI as a contender."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.bench.contender import Contender, Stamp, Tokens
from fxopt.bench.gguf_files import file_of, why_no_file
from fxopt.bench.setting import Setting
from fxopt.bench.subject import Subject

_PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_MODEL = "openvino_model.xml"


class OpenVino(Contender):
    """A model that was exported for it, or a GGUF file; of those it reads float16 alone, and computes as asked."""

    name = "OpenVINO GenAI"
    shares_weights = False

    def why_not(self, subject: Subject, setting: Setting) -> str | None:
        if missing := [name for name in ("openvino_genai", "gguf") if find_spec(name) is None]:
            return f'{missing[0]} is not installed; pip install "fxopt[peers]"'
        if subject.source.device.type != "cpu":
            return f"it does not run on {subject.source.device.type}"
        if setting.batch > 1:
            return "it streams one sequence at a time"
        missing_file = None if _is_exported(subject) else why_no_file(subject.source, torch.float16)
        if missing_file is None or subject.source.random:
            return missing_file
        return f"there is no {_MODEL} in {subject.source.name}; optimum-cli export openvino writes one"

    def prepare(self, subject: Subject) -> None:
        from openvino_genai import LLMPipeline

        self._scratch = tempfile.TemporaryDirectory()
        path = Path(subject.source.name)
        if not _is_exported(subject):
            path = file_of(subject.source, torch.float16, Path(self._scratch.name))
        precision = _PRECISIONS[subject.source.dtype]
        self._pipeline = LLMPipeline(
            path,
            "CPU",
            ATTENTION_BACKEND="SDPA",  # the other one would find the prompt in its cache
            INFERENCE_PRECISION_HINT=precision,
            KV_CACHE_PRECISION=precision,
            DYNAMIC_QUANTIZATION_GROUP_SIZE=0,
            INFERENCE_NUM_THREADS=torch.get_num_threads(),
        )

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        from openvino import Tensor as Fed
        from openvino_genai import GenerationConfig

        config = GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        found = self._pipeline.generate(Fed(prompt.numpy()), config, *([] if stamp is None else [_stamping(stamp)]))
        return [list(tokens) for tokens in found.tokens]


def _is_exported(subject: Subject) -> bool:
    return not subject.source.random and (Path(subject.source.name) / _MODEL).exists()


def _stamping(stamp: Stamp) -> Any:
    from openvino_genai import StreamerBase, StreamingStatus

    class Stamping(StreamerBase):
        def write(self, tokens: Any) -> Any:
            for _ in tokens if isinstance(tokens, list) else [tokens]:
                stamp()
            return StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Stamping()
