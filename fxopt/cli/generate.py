"""``fxopt generate MODEL``: optimise a model and generate once."""

from __future__ import annotations

import argparse
import sys

from fxopt.cli.options import Commands, add_model, add_optimising, add_running, optimised, positive, tokenized

HELP = "optimise a model and generate once"


def add(commands: Commands) -> None:
    parser = commands.add_parser("generate", help=HELP, description=HELP)
    add_model(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=positive, default=100)
    parser.add_argument("--report", action="store_true", help="print what was rewritten, to stderr")
    add_optimising(parser)
    add_running(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _, fast, tokenizer = optimised(arguments, arguments.model)
    inputs = tokenized(tokenizer, arguments.prompt, arguments.device)
    output = fast.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    if arguments.report:
        print(fast.fxopt.report, file=sys.stderr)
    return 0
