"""What pass authors test with really fails, each check by a pass that is wrong in just that way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node

from fxopt.errors import InvalidRequestError
from fxopt.families import FAMILIES, tiny
from fxopt.outcome import Outcome
from fxopt.passes.decode_attention import DecodeAttention
from fxopt.passes.last_logits import LastLogits
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.program import Program
from fxopt.rewrite import Pass, Stage
from fxopt.testing import _judge, check_pass, graph_of
from fxopt.views import Miss

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    node: Node


@dataclass(frozen=True)
class Good(Pass[Call]):
    """silu(x) as x * sigmoid(x)"""

    name = "good"
    summary = "writes silu out"

    def find(self, program: Program) -> Iterator[Call | Miss]:
        yield from (Call(node) for node in program.graph.nodes if node.target is aten.silu.default)

    def rewrite(self, program: Program, site: Call) -> None:
        _written_out(program, site.node, aten.sigmoid.default)


def _written_out(program: Program, node: Node, gate: Any) -> None:
    with program.graph.inserting_before(node):
        factor = program.graph.call_function(gate, (node.args[0],))
        product = program.graph.call_function(aten.mul.Tensor, (node.args[0], factor))
    node.replace_all_uses_with(product)


class Expects(Good):
    def expected(self, program: Program) -> int:
        return 3


class Refuses(Good):
    def find(self, program: Program) -> Iterator[Call | Miss]:
        first, *others = super().find(program)
        yield first
        yield from (Miss(other.node, "is not the first") for other in others)

    def refuse(self, program: Program, site: Call) -> str | None:
        return "is not wanted"


class Repeats(Good):
    """Its result is what it looks for."""

    def rewrite(self, program: Program, site: Call) -> None:
        with program.graph.inserting_before(site.node):
            site.node.replace_all_uses_with(program.graph.call_function(aten.silu.default, site.node.args))


class Finishes(Good):
    """Does something each time, matched or not."""

    def finish(self, program: Program, matched: int) -> None:
        last = program.logits()
        with program.graph.inserting_after(last):
            again = program.graph.call_function(aten.mul.Tensor, (last, 1.0))
        program.output().replace_input_with(last, again)


class Wrong(Good):
    def rewrite(self, program: Program, site: Call) -> None:
        _written_out(program, site.node, aten.tanh.default)


class Fails(Good):
    def rewrite(self, program: Program, site: Call) -> None:
        raise KeyError("no such thing")


class EditsWhileLooking(Good):
    def refuse(self, program: Program, site: Call) -> str | None:
        _written_out(program, site.node, aten.sigmoid.default)
        return None

    def rewrite(self, program: Program, site: Call) -> None: ...


class WritesIntoWeights(Good):
    def finish(self, program: Program, matched: int) -> None:
        with torch.no_grad():
            next(tensor for _, tensor in program.weights()).mul_(1.0)


@dataclass(frozen=True)
class EditsAnother(Good):
    """Edits a graph that it holds on to, not the one that it is called with."""

    victim: list[Program] = field(default_factory=list, hash=False)

    def rewrite(self, program: Program, site: Call) -> None:
        super().rewrite(program, site)
        for node in self.victim[0].graph.nodes:
            if node.target is aten.silu.default:
                node.target = aten.relu.default


class CannotRun(Good):
    """Only numbers show that what it asserts does not hold."""

    def rewrite(self, program: Program, site: Call) -> None:
        with program.graph.inserting_before(site.node):
            infinite = program.graph.call_function(aten.isinf.default, (site.node.args[0],))
            any_is = program.graph.call_function(aten.any.default, (infinite,))
            program.graph.call_function(aten._assert_async.msg, (any_is, "nothing is infinite"))
        super().rewrite(program, site)


class MatchesNothing(Good):
    def find(self, program: Program) -> Iterator[Call | Miss]:
        yield from ()


LLAMA: dict[str, Any] = {"models": ["llama"]}


def complaint(rewriter: Pass[Any], **options: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        check_pass(rewriter, **{**LLAMA, **options})
    return str(raised.value)


def test_a_good_pass() -> None:
    outcomes = check_pass(Good(), matched={"llama": 2, "gpt2": 0})
    assert list(outcomes) == ["llama", "gemma2", "gpt2"]
    assert outcomes["llama"].ops == {"aten.silu.default": -2, "aten.mul.Tensor": 2, "aten.sigmoid.default": 2}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Good, {"matched": {"llama": 3}}, ["it matched 2 of 3 places; left alone: none"]),
        (Expects, {}, ["it matched 2 of 3 places"]),
        (Refuses, {"matched": {"llama": 2}}, ["0 of 2", "silu (", "is not wanted; silu_1 (", "is not the first"]),
        (Repeats, {}, ["in its own result it matches again: silu_default and 1 more"]),
        (Finishes, {}, ["it matches nothing, and yet changes it:\n", "+    mul_tensor", "mul("]),
        (Wrong, {}, ["something else than the stock model: ", "allowed"]),
        (CannotRun, {}, ["its graph fails when run, RuntimeError: nothing is infinite"]),
        (Fails, {}, ["raised KeyError: 'no such thing'"]),
        (EditsWhileLooking, {}, ["sigmoid_default was made outside of rewrite", "may only look"]),
        (WritesIntoWeights, {}, ["it wrote into ", "weight", "the model's own"]),
        (MatchesNothing, {"models": ["llama", "gpt2"]}, ["matched nothing on llama, gpt2, so that nothing was"]),
    ],
)
def test_what_is_found(kind: Callable[[], Pass[Any]], options: dict[str, Any], words: list[str]) -> None:
    said = complaint(kind(), **options)
    assert said.startswith("good ")
    for word in words:
        assert word in said, said


def test_a_graph_that_was_given_is_left_alone_and_not_kept_when_it_was_not() -> None:
    victim = graph_of("llama")
    assert "it changed the graph that it was given" in complaint(EditsAnother(victim=[victim]))
    assert graph_of("llama") is not victim
    check_pass(Good(), ["llama"])


def test_one_sentence_for_each_model() -> None:
    lines = complaint(Good(), models=["llama", "gpt2", "gemma2"], matched={"llama": 1, "gpt2": 1}).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["good on llama", "good on gpt2"]


def test_expectations_for_models_that_are_not_there() -> None:
    with pytest.raises(InvalidRequestError, match="matched speaks of gpt2; the models are llama"):
        check_pass(Good(), ["llama"], matched={"gpt2": 0})
    with pytest.raises(InvalidRequestError, match="no tiny 'lama'; there are llama, mistral"):
        check_pass(Good(), ["lama"])


def test_golden_texts(tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    assert f"there is no golden text {golden / 'llama_good.txt'}; make it" in complaint(Good(), golden=golden)
    assert not golden.exists()
    check_pass(Good(), ["llama", "gemma2"], matched={"gemma2": 0}, golden=golden, update_golden=True)
    assert {path.name for path in golden.iterdir()} == {"llama_good.txt", "gemma2_good.txt"}
    assert "sigmoid_default_1 = sigmoid(" in (golden / "llama_good.txt").read_text()
    check_pass(Good(), ["llama"], golden=golden)

    text = (golden / "llama_good.txt").read_text()
    (golden / "llama_good.txt").write_text(text.replace("sigmoid(", "tanh("))
    said = complaint(Good(), golden=golden)
    assert "\n-sigmoid_default_1 = tanh(" in said
    assert "\n+sigmoid_default_1 = sigmoid(" in said


def test_a_wrong_pass_writes_no_golden_text(tmp_path: Path) -> None:
    complaint(Wrong(), golden=tmp_path, update_golden=True)
    assert not list(tmp_path.iterdir())


def test_a_pass_for_single_tokens() -> None:
    outcome = check_pass(DecodeAttention(), ["llama"])["llama"]
    assert outcome.matched == outcome.expected == 2

    class Broken(DecodeAttention):
        def finish(self, program: Program, matched: int) -> None:
            for node in program.graph.nodes:
                if node.target is aten.softmax.int:
                    node.target = aten.log_softmax.int

    assert "something else than the stock model" in complaint(Broken())


def test_what_stands_in_front() -> None:
    """The built-in passes up to the pass's own place, unless others are named."""
    calls: list[set[str]] = []

    @dataclass(frozen=True)
    class Looks(Good):
        after = "static_kv"

        def find(self, program: Program) -> Iterator[Call | Miss]:
            made_by = {stamp for node in program.graph.nodes for stamp in node.meta.get("fxopt", ())}
            calls.append(made_by - {"good"})
            yield from super().find(program)

    check_pass(Looks(), ["llama"])
    check_pass(Looks(), ["llama"], before=[RemoveControlFlow()])
    assert calls[::2] == [{"static_kv"}, set()]

    @dataclass(frozen=True)
    class Elsewhere(Good):
        after = "theirs"

    with pytest.raises(InvalidRequestError, match="good goes behind theirs, which is not built in"):
        check_pass(Elsewhere(), ["llama"])


def test_a_model_of_ones_own() -> None:
    model = tiny("llama", num_hidden_layers=3)
    outcomes: dict[str, Outcome] = check_pass(Good(), [model], matched={"llama": 3})
    assert outcomes["llama"].matched == 3


def test_graphs_are_kept_and_the_same_for_all() -> None:
    assert graph_of("llama") is graph_of("llama")
    assert not graph_of("llama", []).has_input("cache_position")
    decode = graph_of("llama", stage=Stage.DECODE)
    assert decode.placeholders()["input_ids"].meta["val"].shape == (1, 1)
    stamps = {stamp for node in decode.graph.nodes for stamp in node.meta.get("fxopt", ())}
    assert {"static_kv", "matvec"} <= stamps
    assert LastLogits.name in stamps
    assert _judge("llama") is _judge("llama")


def test_making_a_tiny_model_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    first = tiny("llama", num_hidden_layers=1)
    assert torch.equal(torch.rand(3), wanted)
    second = tiny("llama", num_hidden_layers=1)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import fxopt.testing, fxopt.families"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_of_the_family_that_it_is_named_after(family: str) -> None:
    """So that a model of one's own and a tiny one go by the same names."""
    assert tiny(family).config.model_type == family
