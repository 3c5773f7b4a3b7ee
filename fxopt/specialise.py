"""From the one symbolic graph to the graphs that run: batch and step bound, constants folded."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.driver import remove_dead_code
from fxopt.errors import RewriteError
from fxopt.program import ATTENTION_MASK, INPUT_IDS, LOGIT_POSITIONS, Program
from fxopt.propagate import fold_constants, propagate, read_sizes_from_inputs
from fxopt.symbols import expression, fresh_size

SEQUENCES = 7  # a typical batch; a number that is the size of nothing else


@dataclass(frozen=True)
class Role:
    """One of the graphs that a model runs as."""

    name: str
    batch: int | None  # None: any number of sequences from two
    longest_step: int  # 1: one token at a time; more: any number from 2 to this
    all_logits: bool = False  # logits of every token fed, not of the last one alone

    @property
    def sequences(self) -> str:
        """The batch in words."""
        return "two sequences or more" if self.batch is None else f"{self.batch} sequence{'s' * (self.batch > 1)}"


def specialise(program: Program, role: Role) -> Program:
    """Bind the symbols of ``program`` for ``role``; sizes that become numbers are written as such."""
    bound = program.copy()
    bound.fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    sizes = _sizes(program, bound.shape_env, role)
    with bound.fake_mode:
        for node in bound.placeholders().values():
            old = node.meta["val"]
            new = [sizes.get(e, e) if (e := expression(size)) is not None else size for size in old.shape]
            shape = [int(size) if isinstance(size, sympy.Integer) else size for size in new]
            node.meta["val"] = torch.empty(shape, dtype=old.dtype, device=old.device)
        mask = bound.placeholders()[ATTENTION_MASK]
        if isinstance(mask.meta["val"].shape[1], torch.SymInt):
            # The runtime hands in the first columns of a mask over all rows, as they lie.
            mask.meta["val"] = mask.meta["val"].as_strided(mask.meta["val"].shape, (program.facts.capacity, 1))
    propagate(bound)
    fold_constants(bound)
    read_sizes_from_inputs(bound)
    remove_dead_code(bound)
    bound.graph.lint()
    _check_still_symbolic(bound, role, [size for size in sizes.values() if isinstance(size, torch.SymInt)])
    return bound.trimmed()


def _sizes(program: Program, shape_env: ShapeEnv, role: Role) -> dict[sympy.Expr, int | torch.SymInt]:
    """What each symbolic size of the captured graph stands for in this role."""
    inputs = program.placeholders()
    tokens = inputs[INPUT_IDS].meta["val"]
    # A hint is a typical value, and must not be one that code treats differently.
    step: int | torch.SymInt = 1
    if role.longest_step > 1:
        step = fresh_size(shape_env, "step", hint=max(3, role.longest_step - 1))
    sizes: dict[sympy.Expr, int | torch.SymInt] = {}

    def bind(size: object, value: int | torch.SymInt) -> None:
        symbol = expression(size)
        if isinstance(symbol, sympy.Symbol):
            sizes[symbol] = value

    bind(tokens.shape[0], role.batch or fresh_size(shape_env, "batch", hint=SEQUENCES))
    bind(tokens.shape[1], step)
    window = expression(inputs[ATTENTION_MASK].meta["val"].shape[1])
    if isinstance(window, sympy.Symbol):
        sizes[window] = fresh_size(shape_env, "window", hint=max(2, program.facts.capacity - 1))
    if LOGIT_POSITIONS in inputs:
        bind(inputs[LOGIT_POSITIONS].meta["val"].shape[0], step if role.all_logits else 1)
    return sizes


def _check_still_symbolic(program: Program, role: Role, sizes: list[torch.SymInt]) -> None:
    """A size that an op has pinned to its example would be wrong for every other length."""
    for size in sizes:
        now = program.shape_env.replace(size.node.expr)
        if now.is_number:
            raise RewriteError(
                f"the {role.name} graph holds only for one length ({size.node.expr} = {now}): an op of the model "
                "depends on it. Use the stock model, or report the architecture."
            )
