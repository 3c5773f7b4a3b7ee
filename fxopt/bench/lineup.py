"""Who takes part: contenders by name, or the passes of fxopt added one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.bench.contender import Contender
from fxopt.bench.llama_cpp import LlamaCpp
from fxopt.bench.openvino import OpenVino
from fxopt.bench.ours import Ours
from fxopt.bench.stock import DynamicCompiled, StaticCompiled, StockEager
from fxopt.lower import Backend, Compile
from fxopt.rewrite import Pass


@dataclass(frozen=True)
class Ways:
    """How contenders compile, and the passes of those that are ours."""

    passes: Sequence[Pass[Any]]
    backend: Backend = "inductor"
    compiles: Sequence[Compile] = ("auto",)


def _ours(ways: Ways) -> list[Contender]:
    if len(ways.compiles) == 1:
        return [Ours("fxopt", ways.passes, ways.backend, ways.compiles[0])]
    return [Ours(f"fxopt, {how}", ways.passes, ways.backend, how) for how in ways.compiles]


#: By the name that chooses them, in the order of the table; the stock model, which all are compared with, is first.
CONTENDERS: dict[str, Callable[[Ways], list[Contender]]] = {
    "stock": lambda ways: [StockEager()],
    "dynamic": lambda ways: [DynamicCompiled(ways.backend)],
    "static": lambda ways: [StaticCompiled(ways.backend)],
    "fxopt": _ours,
    "llama.cpp": lambda ways: [LlamaCpp()],
    "openvino": lambda ways: [OpenVino()],
}
#: Those who take part where nobody is named; compiling the growing cache takes minutes, and seldom pays.
USUAL = tuple(name for name in CONTENDERS if name != "dynamic")


def chosen(names: Sequence[str], ways: Ways) -> list[Contender]:
    """The contenders of these names."""
    return [one for name, make in CONTENDERS.items() if name in names for one in make(ways)]


def ablation(ways: Ways) -> list[Contender]:
    """The stock model, the passes that nothing works without, and then one more each time, in the order of work.

    Nothing is verified and taken back: a pass that changes the tokens is to show.
    """
    found: list[Contender] = [StockEager()]
    needed = [one for one in ways.passes if one.required]
    for place, added in enumerate([None, *(one for one in ways.passes if not one.required)]):
        extra = [one for one in ways.passes if not one.required][:place]
        passes = [one for one in ways.passes if one in needed or one in extra]
        name = f"+ {added.name}" if added is not None else " + ".join(one.name for one in needed)
        found.append(Ours(name, passes, ways.backend, ways.compiles[0], verify="off"))
    return found
