"""A pass that computes something else, or does less than it promised: named and taken back, or a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from edited_programs import before, into_logits
from torch.fx import Node
from untouched import FEW, State, assert_untouched, generate, optimise, outcome_of

import fxopt
from fxopt.errors import RewriteError, VerificationError
from fxopt.families import tiny
from fxopt.outcome import Check
from fxopt.passes.fuse_gate_up import FuseGateUp, Gate
from fxopt.passes.static_kv import Growth, StaticKV
from fxopt.program import Program
from fxopt.rewrite import Pass, Stage
from fxopt.views import swap_argument

pytestmark = pytest.mark.usefixtures("no_other_warnings")

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """``node`` computes one over the length of a row."""

    node: Node


@dataclass(frozen=True)
class Louder(Pass[Norm]):
    """Wrong: every norm a little too large."""

    name = "louder"
    summary = "multiplies norms"
    factor: float = 1.01

    def find(self, program: Program) -> Iterator[Norm]:
        for node in program.graph.nodes:
            if node.target is aten.rsqrt.default:
                yield Norm(node)

    def rewrite(self, program: Program, site: Norm) -> None:
        with program.graph.inserting_after(site.node):
            scaled = program.graph.call_function(aten.mul.Tensor, (site.node, self.factor))
        site.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


@dataclass(frozen=True)
class LouderDecode(Louder):
    """The same in the graph of one new token alone."""

    name = "louder_decode"
    stage = Stage.DECODE


@dataclass(frozen=True)
class Swapped(FuseGateUp):
    """Wrong: gate and up change places."""

    def rewrite(self, program: Program, site: Gate) -> None:
        gate, up = site.gate, site.up
        first = min(gate.node, up.node)
        for weight in (gate.weight, up.weight):
            first.prepend(weight)
        swap_argument(gate.node, gate.weight, up.weight)
        swap_argument(up.node, up.weight, gate.weight)


@dataclass(frozen=True)
class WrongRows(StaticKV):
    """Wrong, and needed: what is written into the cache is a little too large."""

    def rewrite(self, program: Program, site: Growth) -> None:
        assert site.concat is not None
        new = site.concat.parts[1]
        with program.graph.inserting_before(site.node):
            scaled = program.graph.call_function(aten.mul.Tensor, (new, 1.01))
        swap_argument(site.node, new, scaled)
        fixed = dataclasses.replace(site, concat=dataclasses.replace(site.concat, parts=(site.past, scaled)))
        super().rewrite(program, fixed)


WRONG: list[tuple[str, Any, str]] = [
    ("louder", ["fuse_qkv", Louder()], "fuse_qkv"),
    ("fuse_gate_up", ["fuse_qkv", Swapped()], "fuse_qkv"),
    ("louder_decode", ["fuse_qkv", "last_logits", LouderDecode()], "last_logits"),
]


@pytest.mark.parametrize(("name", "passes", "right"), WRONG)
@pytest.mark.usefixtures("captured_once")
def test_a_wrong_pass_is_dropped(stock_llama: Any, stock_state: State, name: str, passes: Any, right: str) -> None:
    with pytest.warns(
        UserWarning, match=f"with {name} applied, .* differ from the stock model's by .*; fxopt goes on without"
    ):
        fast = optimise(stock_llama, passes=passes)
    outcome = outcome_of(fast, name)
    assert outcome.dropped is not None
    assert "differ from the stock model's by" in outcome.dropped
    assert f"{name}: dropped" in str(fast.fxopt.report)
    assert outcome_of(fast, right).dropped is None
    assert outcome_of(fast, right).matched == 1
    assert all(check.error <= check.allowed for check in fast.fxopt.report.checks)
    assert generate(fast) == stock_state.tokens
    assert_untouched(stock_llama, stock_state)


@pytest.mark.parametrize(("name", "passes", "right"), WRONG)
@pytest.mark.usefixtures("captured_once")
def test_a_wrong_pass_under_strict(stock_llama: Any, stock_state: State, name: str, passes: Any, right: str) -> None:
    with pytest.raises(VerificationError, match=f"with {name} applied, .* differ from the stock model's") as raised:
        optimise(stock_llama, passes=passes, strict=True)
    assert right not in str(raised.value)
    assert_untouched(stock_llama, stock_state)


@pytest.mark.usefixtures("captured_once")
def test_two_wrong_passes_are_both_found(stock_llama: Any, stock_state: State) -> None:
    with pytest.warns(UserWarning, match="goes on without") as caught:
        fast = optimise(stock_llama, passes=[Swapped(), Louder(), "rotary"])
    said = [str(warning.message) for warning in caught if "goes on without" in str(warning.message)]
    assert [sentence.split()[1] for sentence in said] == ["fuse_gate_up", "louder"]
    assert outcome_of(fast, "rotary").matched == 2
    assert generate(fast) == stock_state.tokens


@pytest.mark.usefixtures("captured_once")
def test_a_wrong_pass_that_is_needed(stock_llama: Any, stock_state: State) -> None:
    """There is no result without it, strict or not."""
    with pytest.raises(VerificationError, match="with static_kv applied"):
        optimise(stock_llama, passes={"static_kv": WrongRows()})
    assert_untouched(stock_llama, stock_state)


@pytest.mark.usefixtures("captured_once")
def test_without_verification_a_wrong_pass_stays(stock_llama: Any) -> None:
    """``verify="off"`` trusts: nothing is compared, nothing is claimed."""
    fast = optimise(stock_llama, passes=["fuse_qkv", Louder()], verify="off")
    assert outcome_of(fast, "louder").dropped is None
    assert fast.fxopt.report.checks == []


@pytest.mark.usefixtures("captured_once")
def test_no_pass_to_blame(stock_llama: Any, stock_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are right and the code made of them is not: said so, with the backend."""
    monkeypatch.setattr("fxopt.judge.Judge.engine", lambda *_, **__: (Check("", 1.0, 0.0), "the logits differ"))
    with pytest.raises(VerificationError, match=r"compiled by eager they do not: the logits differ.*backend="):
        optimise(stock_llama, passes=FEW)
    assert_untouched(stock_llama, stock_state)


# --- a pass that matches less than it expects ----------------------------------------------------


@dataclass(frozen=True)
class Hopeful(Louder):
    """Expects more than there is, and refuses some of it; changes nothing."""

    name = "hopeful"
    factor: float = 1.0
    refuses: bool = False

    def expected(self, program: Program) -> int:
        return 7

    def refuse(self, program: Program, site: Norm) -> str | None:
        return f"{site.node} is not to my taste" if self.refuses else None


@pytest.mark.parametrize(
    ("refuses", "matched", "why"), [(False, 3, "no site was found"), (True, 0, "rsqrt is not to my taste")]
)
@pytest.mark.usefixtures("captured_once")
def test_fewer_places_than_expected(
    stock_llama: Any, stock_state: State, refuses: bool, matched: int, why: str
) -> None:
    passes = [Hopeful(refuses=refuses)]
    sentence = f"hopeful matched {matched} of 7 places .*{why}.*strict=True asks for all"
    with pytest.raises(RewriteError, match=sentence):
        optimise(stock_llama, passes=passes, strict=True)
    assert_untouched(stock_llama, stock_state)

    fast = optimise(stock_llama, passes=passes)
    outcome = outcome_of(fast, "hopeful")
    assert (outcome.matched, outcome.expected, len(outcome.refused)) == (matched, 7, 3 - matched)
    assert generate(fast) == stock_state.tokens


# --- a pass whose graph does not run -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Crashes(Pass[Any]):
    """Picks a row that is not there: found out when the graph is run."""

    name = "crashes"
    summary = "raises while the graph runs"

    def find(self, program: Program) -> Iterator[Any]:
        yield RowsOfLogits(program.logits())

    def rewrite(self, program: Program, site: Any) -> None:
        index = before(program, program.output(), aten.full.default, [1], 99999)
        index.kwargs = {"dtype": torch.long}
        into_logits(program, before(program, program.output(), aten.index_select.default, site.node, 1, index))


@dataclasses.dataclass(frozen=True)
class RowsOfLogits:
    node: Node


def test_a_pass_whose_graph_crashes_is_dropped() -> None:
    stock = tiny("llama", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="crashes"):
        fast: Any = fxopt.optimize(stock, 32, backend="eager", passes=["fuse_qkv", Crashes()])
    assert next(o for o in fast.fxopt.report.passes if o.name == "crashes").dropped
    with pytest.raises(fxopt.FxoptError, match="crashes"):
        fxopt.optimize(stock, 32, backend="eager", passes=["fuse_qkv", Crashes()], strict=True)
