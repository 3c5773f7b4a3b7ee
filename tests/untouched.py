"""A stock model that must be as it was, whatever goes wrong while it is optimised."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fxopt
from fxopt.outcome import Outcome

MAX_LEN = 32
#: An attention implementation that the capture has to replace for a while.
OWN_ATTENTION = "fxopt_test_attention"
TOKENS = torch.tensor([[5, 6, 7]])
#: Two passes that matter, for tests that are about something else.
FEW = ("fuse_qkv", "fuse_gate_up")


@dataclass
class State:
    """Everything about a stock model that must survive."""

    kind: type
    weights: dict[str, Tensor]
    config: dict[str, Any]
    attention: str
    generation_config: dict[str, Any]
    attributes: set[str]
    forward: Any
    requires_grad: dict[str, bool]
    training: bool
    tokens: list[list[int]]

    @classmethod
    def of(cls, model: Any) -> State:
        return cls(
            type(model),
            {name: value.clone() for name, value in model.state_dict().items()},
            copy.deepcopy(model.config.to_dict()),
            model.config._attn_implementation,
            model.generation_config.to_dict(),
            set(vars(model)),
            type(model).forward,
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            model.training,
            generate(model),
        )


def generate(model: Any) -> list[list[int]]:
    tokens: list[list[int]] = model.generate(TOKENS, max_new_tokens=8, do_sample=False).tolist()
    return tokens


def assert_untouched(model: Any, before: State) -> None:
    after = State.of(model)
    assert after.weights.keys() == before.weights.keys()
    for name, value in before.weights.items():
        assert torch.equal(after.weights[name], value), name
    for field in dataclasses.fields(State):
        if field.name != "weights":
            assert getattr(after, field.name) == getattr(before, field.name), field.name


def raiser(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("injected")

    return fail


def optimise(stock: Any, **options: Any) -> Any:
    return fxopt.optimize(stock, MAX_LEN, backend="eager", **options)


def outcome_of(fast: Any, name: str) -> Outcome:
    found: Outcome = next(outcome for outcome in fast.fxopt.report.passes if outcome.name == name)
    return found
