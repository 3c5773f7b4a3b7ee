"""``fxopt verify MODEL``: the user's own prompts; exit code 1 if any token differs."""

from __future__ import annotations

import argparse
import json

from fxopt.cli.options import Commands, add_model, add_optimising, add_prompts, add_running, optimised, prompts
from fxopt.token_check import verify

HELP = "compare the tokens for your prompts; exit code 1 if any differs"


def add(commands: Commands) -> None:
    parser = commands.add_parser("verify", help=HELP, description=HELP)
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    add_optimising(parser)
    add_running(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    texts = prompts(arguments)
    stock, fast, tokenizer = optimised(arguments, arguments.model)
    check = verify(
        stock,
        fast,
        texts,
        tokenizer=tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    print(json.dumps(check.to_dict(), indent=2) if arguments.json else check)
    return 0 if check.same else 1
