"""Traces of short runs, for TensorBoard's profiler page or chrome://tracing."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from fxopt.bench.contender import Contender
from fxopt.bench.setting import Setting

NEW = 8  # tokens; a trace of hundreds shows no more and takes minutes to open


class Traces:
    """A folder below ``folder`` for every contender."""

    def __init__(self, folder: str | Path = "tb_logs") -> None:
        self.folder = Path(folder)

    def record(self, contender: Contender, prompt: Tensor, setting: Setting) -> None:
        place = self.folder / _plain(contender.name)
        activities = [ProfilerActivity.CPU]
        if prompt.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        size = f"batch{setting.batch}_prompt{setting.prompt}_max{setting.max_len}"
        handler = tensorboard_trace_handler(str(place), worker_name=size)
        with profile(activities=activities, record_shapes=True, profile_memory=True, on_trace_ready=handler):
            contender.generate(prompt, min(NEW, setting.new), None)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
