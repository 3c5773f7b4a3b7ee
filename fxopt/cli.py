"""The command line: ``fxopt demo``, ``fxopt generate MODEL``, ``fxopt passes``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Sequence
from typing import Any

DEFAULT_PROMPT = "What is a compiler, in one paragraph?"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one sentence and exit code 2."""
    from fxopt.errors import FxoptError

    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (FxoptError, OSError) as error:
        print(f"fxopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxopt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxopt", description="The same tokens, faster, and you see what was done.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="optimise SmolLM2-135M and generate with it beside the stock model")
    _add_common(demo)
    demo.add_argument("--prompt", default=DEFAULT_PROMPT)
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="optimise a model and generate once")
    generate.add_argument("model", metavar="MODEL", help='a folder or name for from_pretrained, or "demo"')
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--report", action="store_true", help="print what was rewritten, to stderr")
    _add_common(generate)
    generate.set_defaults(run=_generate)

    passes = commands.add_parser("passes", help="list every pass, in pipeline order")
    passes.set_defaults(run=_passes)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    from fxopt.lower import BACKENDS
    from fxopt.passes import PASSES

    parser.add_argument("--max-len", type=int, default=512, help="longest prompt and answer together (default 512)")
    parser.add_argument("--max-new-tokens", type=_count, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", choices=BACKENDS, default="inductor")
    parser.add_argument("--strict", action="store_true", help="an incomplete or wrong pass is an error")
    parser.add_argument("--passes", help="names, separated by commas, or a preset; default: all")
    group = parser.add_argument_group("leave one pass out")
    for kind in PASSES:
        if not kind.required:
            flag = f"--no-{kind.name.replace('_', '-')}"
            group.add_argument(flag, dest="left_out", action="append_const", const=kind.name, help=kind.summary)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give at least 1")
    return number


def _selection(arguments: argparse.Namespace) -> Any:
    """What the flags say about passes, in the form that ``optimize`` takes."""
    from fxopt.admission import PRESETS, select

    left_out = set(arguments.left_out or ())
    if arguments.passes is None or arguments.passes in PRESETS:
        return [p for p in select(arguments.passes) if p.name not in left_out]
    return [p for p in select(arguments.passes.split(",")) if p.name not in left_out]


def _optimised(arguments: argparse.Namespace, name: str) -> tuple[Any, Any, Any]:
    """The stock model, the fast one and the tokenizer."""
    import torch
    from transformers.utils import logging as transformers_logging

    from fxopt.api import optimize
    from fxopt.demo_model import load_model
    from fxopt.errors import InvalidRequestError, first_line
    from fxopt.progress import Progress

    selection = _selection(arguments)
    transformers_logging.disable_progress_bar()
    # Loaders draw bars of their own, also into a pipe; the step says enough.
    with Progress().step(f"load {name}"), contextlib.redirect_stderr(io.StringIO()):
        try:
            model, tokenizer = load_model(name, getattr(torch, arguments.dtype))
            model = model.to(arguments.device)
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequestError(f"{name} cannot be loaded to {arguments.device}: {first_line(error)}") from error
    fast = optimize(model, arguments.max_len, passes=selection, backend=arguments.backend, strict=arguments.strict)
    return model, fast, tokenizer


def _inputs(tokenizer: Any, prompt: str, device: str) -> Any:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return inputs.to(device)


def _generate(arguments: argparse.Namespace) -> int:
    _, fast, tokenizer = _optimised(arguments, arguments.model)
    inputs = _inputs(tokenizer, arguments.prompt, arguments.device)
    output = fast.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    if arguments.report:
        print(fast.fxopt.report, file=sys.stderr)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    from fxopt.demo_model import DEMO
    from fxopt.progress import Progress

    stock, fast, tokenizer = _optimised(arguments, DEMO)
    inputs = _inputs(tokenizer, arguments.prompt, arguments.device)
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    rows, outputs, first = [], [], 0.0
    for name, model in (("stock", stock), ("fxopt", fast)):
        model.generate(**inputs, **{**options, "max_new_tokens": 4})  # warm up
        with Progress().step(f"generate with {name}"):
            started = time.perf_counter()
            outputs.append(model.generate(**inputs, **options))
            took = time.perf_counter() - started
        first = first or took
        tokens = outputs[-1].shape[1] - inputs["input_ids"].shape[1]
        rows.append([name, tokens, f"{took:.2f}", f"{tokens / took:.1f}", f"{first / took:.2f}x"])
    print(tokenizer.decode(outputs[-1][0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"\n{fast.fxopt.report}\n")
    print(tabulate(rows, headers=["model", "new tokens", "seconds", "tokens/s", "speed-up"], tablefmt="simple"))
    same = outputs[0].tolist() == outputs[1].tolist()
    print(f"\nSame tokens as the stock model: {'yes' if same else 'no'}")
    if not same:
        print("(In half precision both round, differently; run with --dtype float32 for equality.)")
    return 0 if same or arguments.dtype != "float32" else 1


def _passes(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    from fxopt.passes import PASSES

    rows = []
    for kind in PASSES:
        options = ", ".join(field.name for field in dataclasses.fields(kind()))  # type: ignore[arg-type]
        flag = "needed" if kind.required else f"--no-{kind.name.replace('_', '-')}"
        rows.append([kind.name, kind.stage.value, kind.summary, options, flag])
    print(tabulate(rows, headers=["pass", "graph", "what it rewrites", "options", "leave out"], tablefmt="simple"))
    return 0
