"""``fxopt bisect MODEL``: which passes make the tokens for a prompt differ; exit code 1 if some do."""

from __future__ import annotations

import argparse

from fxopt.cli.options import Commands, add_model, add_prompts, add_running, loaded, prompts, selection
from fxopt.culprit import NothingToFindError, bisect
from fxopt.token_check import SameTokens

HELP = "find the passes, and their places, that change the tokens"


def add(commands: Commands) -> None:
    parser = commands.add_parser("bisect", help=HELP, description=HELP)
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--output", metavar="FILE", help="write a script that shows the fault by itself")
    add_running(parser, backend="eager")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    texts, passes = prompts(arguments), selection(arguments)
    model, tokenizer = loaded(arguments, arguments.model)
    check = SameTokens.of(model, texts, tokenizer, arguments.max_new_tokens, arguments.batch_size)
    try:
        culprit = bisect(
            model, check, arguments.max_len, passes=passes, backend=arguments.backend, compile=arguments.compile
        )
    except NothingToFindError as error:
        print(error)
        return 0
    print(culprit)
    if arguments.output:
        culprit.save(arguments.output)
        print(f"written: {arguments.output}")
    return 1
