"""Configs of tiny models as files, each captured once however often it is planned: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planned_models import MAX_LEN

from fxopt.admission import select
from fxopt.families import tiny
from fxopt.weightless import Weightless, rewritten

FAMILIES = ("llama", "gemma2", "mixtral")
LENGTH = ["--max-len", str(MAX_LEN)]
Configs = Callable[[str], str]

_made: dict[Any, Weightless] = {}


def configs(folder: Path) -> Configs:
    """Where the config of a family is, with nothing beside it."""

    def path(family: str) -> str:
        file = folder / family / "config.json"
        if not file.exists():
            tiny(family).config.save_pretrained(file.parent)
        return str(file)

    return path


def rewritten_once(model: str, max_len: int | None, passes: Any, **options: Any) -> Weightless:
    """What stands for ``rewritten`` in tests."""
    config = Path(model).read_text() if Path(model).is_file() else model
    key = (config, max_len, tuple(one.name for one in select(passes)), options["dtype"])  # the batch is bound later
    if key not in _made:
        _made[key] = rewritten(model, max_len, passes, **options)
    return _made[key]
