"""Optimised models to save, and folders of saved ones to look into, to damage and to edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import fxopt

PROMPT = torch.arange(3, 13)[None]


def optimised(model: PreTrainedModel, **options: Any) -> Any:
    return fxopt.optimize(model, max_len=64, **{"backend": "eager", "verify": "off", **options})


def tokens_of(model: Any, batch: int = 1) -> Tensor:
    found: Tensor = model.generate(PROMPT.repeat(batch, 1), max_new_tokens=12, do_sample=False)
    return found


def inside_of(saved: Path) -> Path:
    return next(saved.glob("saved-*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(saved: Path, name: str, change: Callable[[Any], None]) -> None:
    inside = inside_of(saved)
    manifest = json.loads((inside / "manifest.json").read_bytes())
    if name == "manifest.json":
        change(manifest)
    else:
        data = json.loads((inside / name).read_bytes())
        change(data)
        replace(inside, manifest, name, json.dumps(data).encode())
    (inside / "manifest.json").write_bytes(json.dumps(manifest).encode())


def replace(inside: Path, manifest: Any, name: str, content: bytes) -> None:
    (inside / name).write_bytes(content)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
