"""A fault as one script: the model, the passes and the check, nothing else."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxopt.only import Only
from fxopt.request import Request
from fxopt.rewrite import Pass
from fxopt.token_check import SameTokens

_NOT_WRITTEN = """def check(fast):
    # The check that was given cannot be written out (it is no plain function of its own): put it here.
    found = fxopt.verify(model, fast, [list(range(3, 11))], max_new_tokens=MAX_LEN - 8)
    print(found)
    return found.same"""


@dataclass(frozen=True)
class Reproduction:
    """Everything that a script needs to show the fault again."""

    model: PreTrainedModel
    passes: tuple[Pass[Any], ...]
    request: Request
    check: Callable[[Any], bool]

    def script(self) -> str:
        kinds = dict.fromkeys(type(p.inner if isinstance(p, Only) else p) for p in self.passes)
        imports = [f"from {kind.__module__} import {kind.__qualname__}" for kind in kinds if not _is_local(kind)]
        sources = [textwrap.dedent(inspect.getsource(kind)) for kind in kinds if _is_local(kind)]
        passes = "".join(f"    {_written(p)},\n" for p in self.passes)
        return "\n".join(
            [
                '"""Written by fxopt.bisect: exits with 1 while the fault is there."""',
                "",
                "import fxopt",
                *sorted(imports),
                "",
                f"MAX_LEN = {self.request.max_len}",
                *(f"\n{source}" for source in sources),
                *_model_lines(self.model),
                "",
                _check_source(self.check),
                "",
                f"passes = [\n{passes}]",
                f"fast = fxopt.optimize(model, MAX_LEN, passes=passes, backend={self.request.backend!r}, "
                f'verify="off", chunk={self.request.chunk}, compile={self.request.compile!r})',
                "print(fast.fxopt.report)",
                "good = check(fast)",
                'print("the check is", "good" if good else "bad")',
                "raise SystemExit(0 if good else 1)",
                "",
            ]
        )


def _is_local(kind: type) -> bool:
    """Whether a class can only be had by its source."""
    return kind.__module__ == "__main__" or "." in kind.__qualname__


def _written(rewriter: Pass[Any]) -> str:
    if isinstance(rewriter, Only):
        return f"fxopt.Only({rewriter.inner!r}, sites={tuple(rewriter.sites)!r})"
    return repr(rewriter)


def _model_lines(model: PreTrainedModel) -> list[str]:
    """How to make the model again: from its folder, or with random weights of the same shapes."""
    dtype = str(model.dtype)
    name = str(model.name_or_path or "")
    if name and Path(name).is_dir() and (Path(name) / "config.json").exists():
        folder = repr(str(Path(name).resolve()))
        load = f"AutoModelForCausalLM.from_pretrained({folder}, dtype={dtype}, trust_remote_code=False)"
        load += f".eval().to({str(model.device)!r})"
        return ["import torch", "from transformers import AutoModelForCausalLM", "", f"model = {load}"]
    config = json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str)
    return [
        "import json",
        "import torch",
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "",
        "# The model came from no folder: these are random weights of its shapes. Put in your own way of loading it.",
        "torch.manual_seed(0)",
        f"config = json.loads({config!r})",
        f"config = AutoConfig.for_model({model.config.model_type!r}, "
        '**{name: value for name, value in config.items() if name != "model_type"})',
        f"model = AutoModelForCausalLM.from_config(config, dtype={dtype}).eval().to({str(model.device)!r})",
    ]


def _check_source(check: Callable[[Any], bool]) -> str:
    """The user's check if its source stands by itself."""
    if isinstance(check, SameTokens):
        return check.source()
    if not inspect.isfunction(check):
        return _NOT_WRITTEN
    outside = inspect.getclosurevars(check)
    if outside.nonlocals or outside.globals.keys() - {"torch", "fxopt"}:
        return _NOT_WRITTEN
    try:
        source = textwrap.dedent(inspect.getsource(check)).rstrip()
    except OSError:
        return _NOT_WRITTEN
    if not source.startswith("def "):
        return _NOT_WRITTEN
    return source if check.__name__ == "check" else f"{source}\n\n\ncheck = {check.__name__}"
