"""Flags that several commands share, and what they ask for."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from fxopt.admission import PRESETS, select
from fxopt.api import optimize
from fxopt.demo_model import load_model
from fxopt.errors import InvalidRequestError, first_line
from fxopt.loading import load
from fxopt.lower import BACKENDS, COMPILES
from fxopt.progress import Progress
from fxopt.registry import catalogue
from fxopt.report import Report
from fxopt.request import VERIFICATIONS
from fxopt.rewrite import Pass

Commands = Any  # argparse keeps the type of its sub-parsers to itself
DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help='a folder or name for from_pretrained, or "demo"')


def add_config(parser: argparse.ArgumentParser, **options: Any) -> None:
    """What a command needs that looks at a model without its weights."""
    parser.add_argument(
        "model", metavar="MODEL", help='a folder, a config.json, a name for from_pretrained, or "demo"', **options
    )
    parser.add_argument("--max-len", type=int, help="default: what the model can do, at most 4096")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the config says")


def add_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passes", help="names, separated by commas, or a preset")
    out = parser.add_argument_group("leave one pass out")
    extra = parser.add_argument_group("add one that is not applied by default")
    for kind in catalogue():
        if not kind.required:
            group, chosen = (out, "left_out") if kind.by_default else (extra, "added")
            group.add_argument(flag_of(kind), dest=chosen, action="append_const", const=kind.name, help=kind.summary)


def add_running(parser: argparse.ArgumentParser, *, backend: str = "inductor") -> None:
    """What a command needs that loads a model and optimises it."""
    parser.add_argument("--max-len", type=int, default=512, help="longest prompt and answer together (default 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", choices=BACKENDS, default=backend)
    parser.add_argument("--compile", choices=COMPILES, default="auto", help="the graph as one, or one of its layers")
    add_passes(parser)


def add_optimising(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="an incomplete or wrong pass is an error")
    parser.add_argument("--verify", choices=VERIFICATIONS, default="final", help="when to compare with the stock model")
    parser.add_argument("--save", metavar="FOLDER", help="keep the optimised model, for --load")
    parser.add_argument("--load", metavar="FOLDER", help="take what --save has kept, with the same flags")
    parser.add_argument("--save-report", metavar="FILE", help="write the report as .html, .json or .txt")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument("--batch-size", type=positive, default=1, help="prompts that are fed together (default 1)")


def flag_of(kind: type[Pass[Any]]) -> str:
    """What leaves a pass out, or adds one that is not applied by default."""
    return f"--{'no-' * kind.by_default}{kind.name.replace('_', '-')}"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give at least 1")
    return number


def selection(arguments: argparse.Namespace) -> list[Pass[Any]]:
    """What the flags say about passes."""
    left_out, added = set(arguments.left_out or ()), arguments.added or []
    named = arguments.passes
    chosen = select(named if named is None or named in PRESETS else named.split(","))
    return [p for p in select([*chosen, *added]) if p.name not in left_out]


def prompts(arguments: argparse.Namespace) -> list[str]:
    found = list(arguments.prompt)
    if arguments.prompts is not None:
        found += [line for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise InvalidRequestError("there is no prompt; give --prompt TEXT, or --prompts FILE with one per line")
    return found


def loaded(arguments: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The stock model and its tokenizer."""
    transformers_logging.disable_progress_bar()
    # Loaders draw bars of their own, also into a pipe; the step says enough.
    with Progress().step(f"load {name}"), contextlib.redirect_stderr(io.StringIO()):
        try:
            model, tokenizer = load_model(name, getattr(torch, arguments.dtype))
            return model.to(arguments.device), tokenizer
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequestError(f"{name} cannot be loaded to {arguments.device}: {first_line(error)}") from error


def optimised(arguments: argparse.Namespace, name: str) -> tuple[Any, Any, Any]:
    """The stock model, the fast one and the tokenizer."""
    passes = selection(arguments)
    model, tokenizer = loaded(arguments, name)
    options = {"passes": passes, "backend": arguments.backend, "compile": arguments.compile}
    if arguments.load:
        fast = load(arguments.load, model, expected={"max_len": arguments.max_len, **options})
    else:
        fast = optimize(model, arguments.max_len, strict=arguments.strict, verify=arguments.verify, **options)
    if arguments.save:
        fast.fxopt.save(arguments.save)
        print(f"saved: {arguments.save}", file=sys.stderr)
    if arguments.save_report:
        save(fast.fxopt.report, arguments.save_report)
    return model, fast, tokenizer


def dtype_of(arguments: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, arguments.dtype) if arguments.dtype else None


def save(report: Report, path: str) -> None:
    report.save(path)
    print(f"report: {path}", file=sys.stderr)


def tokenized(tokenizer: Any, prompt: str, device: str) -> Any:
    """A prompt through the chat template, if there is one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return inputs.to(device)
