"""Whatever goes wrong on the way, the stock model is as it was, and the sentence says what did."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import fxopt
from fxopt.capture import capture
from fxopt.errors import CaptureError, FxoptError, RewriteError, VerificationError
from fxopt.families import tiny
from fxopt.outcome import Check, Outcome
from fxopt.passes.fuse_gate_up import FuseGateUp, Gate
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.static_kv import Growth, StaticKV
from fxopt.program import Program
from fxopt.rewrite import Pass, Stage
from fxopt.views import swap_argument

aten = torch.ops.aten
MAX_LEN = 32
#: An attention implementation that the capture has to replace for a while.
OWN_ATTENTION = "fxopt_test_attention"
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)
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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for a second thread takes longer than the work of a tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock() -> Any:
    """One model for all tests: each leaves it as it was, or the next one fails."""
    AttentionInterface.register(OWN_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(OWN_ATTENTION, sdpa_mask)
    model = tiny("llama", num_hidden_layers=1)
    model.set_attn_implementation(OWN_ATTENTION)
    return model


@pytest.fixture(scope="module")
def before(stock: Any) -> State:
    return State.of(stock)


@pytest.fixture(scope="module")
def captured(stock: Any) -> Program:
    return capture(stock, max_len=MAX_LEN, capacity=64)


@pytest.fixture
def quick(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not capture again for failures that come later."""
    monkeypatch.setattr("fxopt.request.capture", lambda model, **sizes: captured.copy())


@pytest.fixture(autouse=True)
def no_other_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fxopt goes on.*")
        yield


def raiser(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("injected")

    return fail


def optimise(stock: Any, **options: Any) -> Any:
    return fxopt.optimize(stock, MAX_LEN, backend="eager", **options)


def outcome_of(fast: Any, name: str) -> Outcome:
    found: Outcome = next(outcome for outcome in fast.fxopt.report.passes if outcome.name == name)
    return found


# --- stages of optimize --------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
def test_export_fails(stock: Any, before: State, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    seen = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        seen.append(stock.config._attn_implementation)
        raise error("injected")

    monkeypatch.setattr("torch.export.export", fail)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CaptureError
    with pytest.raises(expected, match="injected"):
        optimise(stock)
    assert seen == ["sdpa"]
    assert_untouched(stock, before)


def test_the_sentence_of_a_capture_that_fails(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the reason\nand a long tail")

    monkeypatch.setattr("torch.export.export", fail)
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM .*the reason .*stock model is unchanged") as raised:
        optimise(stock)
    assert "long tail" not in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", ERRORS)
def test_probe_fails(stock: Any, before: State, error: type[BaseException]) -> None:
    """The first run of the model raises."""
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CaptureError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stock.model.layers[0]), "forward", raiser(error))
        with pytest.raises(expected, match="injected"):
            optimise(stock)
    assert_untouched(stock, before)


@pytest.mark.parametrize(
    ("place", "errors"),
    [
        ("fxopt.api.Judge", [KeyboardInterrupt]),
        ("fxopt.judge.answered", [KeyboardInterrupt]),
        ("fxopt.api.pack", [RuntimeError, KeyboardInterrupt]),
        ("fxopt.pipeline.specialise", [RuntimeError, KeyboardInterrupt]),
        ("fxopt.api.lower", ERRORS),
        ("fxopt.judge.Judge.engine", [RuntimeError]),
        ("fxopt.api.make_fast", [KeyboardInterrupt]),
        ("fxopt.model.copy.deepcopy", [MemoryError]),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_later_stage_fails(
    stock: Any, before: State, monkeypatch: pytest.MonkeyPatch, place: str, errors: list[type[BaseException]]
) -> None:
    for error in errors:
        with monkeypatch.context() as patch:
            patch.setattr(place, raiser(error))
            with pytest.raises((error, FxoptError), match="injected"):
                optimise(stock, passes=FEW)
        assert_untouched(stock, before)


@pytest.mark.usefixtures("quick")
def test_packing_fails_half_way(stock: Any, before: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of weights is re-seated, the other is not: the values are the same all the same."""
    from fxopt import weights

    seat, calls = weights._seat, []

    def fail_later(tensors: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("injected")
        return seat(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "are_adjacent", lambda tensors: False)
        patch.setattr(weights, "_seat", fail_later)
        with pytest.raises(MemoryError, match="injected"):
            optimise(stock, passes=FEW)
    assert len(calls) == 2
    assert_untouched(stock, before)


def test_expert_implementation_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    seen = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        seen.append(model.config._experts_implementation)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.export.export", fail)
    with pytest.raises(KeyboardInterrupt):
        optimise(model)
    assert seen == ["grouped_mm"]
    assert model.config._experts_implementation == "eager"


# --- a pass that raises --------------------------------------------------------------------------

METHODS = ("expected", "find", "refuse", "rewrite", "finish")


@pytest.mark.parametrize(
    ("method", "error"),
    [*((method, RuntimeError) for method in METHODS), ("find", MemoryError), ("rewrite", MemoryError)],
)
@pytest.mark.usefixtures("quick")
def test_an_optional_pass_fails(
    stock: Any, before: State, monkeypatch: pytest.MonkeyPatch, method: str, error: type[Exception]
) -> None:
    """A warning and a line in the report; everything else is done, and the tokens are right."""
    monkeypatch.setattr(FuseQKV, method, raiser(error))
    with pytest.warns(UserWarning, match=f"fuse_qkv failed with {error.__name__}: injected; fxopt goes on without"):
        fast = optimise(stock, passes=FEW)
    outcome = outcome_of(fast, "fuse_qkv")
    assert outcome.matched == 0
    assert outcome.dropped is not None
    assert "injected" in outcome.dropped
    assert "fuse_qkv: dropped, fuse_qkv failed with" in str(fast.fxopt.report)
    assert outcome_of(fast, "fuse_gate_up").matched == 1
    assert generate(fast) == before.tokens
    assert_untouched(stock, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "error", "strict"),
    [
        (FuseQKV, KeyboardInterrupt, False),
        (FuseQKV, RuntimeError, True),
        (StaticKV, RuntimeError, False),
        (StaticKV, MemoryError, False),
        (StaticKV, KeyboardInterrupt, False),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_pass_fails_for_good(
    stock: Any,
    before: State,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Pass[Any]],
    method: str,
    error: type[BaseException],
    strict: bool,
) -> None:
    """A required pass, a strict request, an interrupt: nothing is handed out."""
    monkeypatch.setattr(kind, method, raiser(error))
    expected = KeyboardInterrupt if error is KeyboardInterrupt else RewriteError
    with pytest.raises(expected, match="injected") as raised:
        optimise(stock, passes=FEW, strict=strict)
    if expected is RewriteError:
        assert f"{kind.name} failed with {error.__name__}: injected" in str(raised.value)
        assert "stock model is unchanged" in str(raised.value)
        assert isinstance(raised.value.__cause__, error)
    assert_untouched(stock, before)


@pytest.mark.usefixtures("quick")
def test_a_decode_pass_fails(stock: Any, before: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes.matvec.Matvec.find", raiser(RuntimeError))
    with pytest.warns(UserWarning, match="matvec failed with RuntimeError: injected"):
        fast = optimise(stock, passes=["matvec"])
    assert "injected" in str(outcome_of(fast, "matvec").dropped)
    assert generate(fast) == before.tokens
    with pytest.raises(RewriteError, match="matvec failed"):
        optimise(stock, passes=["matvec"], strict=True)
    assert_untouched(stock, before)


# --- a pass that is wrong ------------------------------------------------------------------------


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
@pytest.mark.usefixtures("quick")
def test_a_wrong_pass_is_dropped(stock: Any, before: State, name: str, passes: Any, right: str) -> None:
    with pytest.warns(
        UserWarning, match=f"with {name} applied, .* differ from the stock model's by .*; fxopt goes on without"
    ):
        fast = optimise(stock, passes=passes)
    outcome = outcome_of(fast, name)
    assert outcome.dropped is not None
    assert "differ from the stock model's by" in outcome.dropped
    assert f"{name}: dropped" in str(fast.fxopt.report)
    assert outcome_of(fast, right).dropped is None
    assert outcome_of(fast, right).matched == 1
    assert all(check.error <= check.allowed for check in fast.fxopt.report.checks)
    assert generate(fast) == before.tokens
    assert_untouched(stock, before)


@pytest.mark.parametrize(("name", "passes", "right"), WRONG)
@pytest.mark.usefixtures("quick")
def test_a_wrong_pass_under_strict(stock: Any, before: State, name: str, passes: Any, right: str) -> None:
    with pytest.raises(VerificationError, match=f"with {name} applied, .* differ from the stock model's") as raised:
        optimise(stock, passes=passes, strict=True)
    assert right not in str(raised.value)
    assert_untouched(stock, before)


@pytest.mark.usefixtures("quick")
def test_two_wrong_passes_are_both_found(stock: Any, before: State) -> None:
    with pytest.warns(UserWarning, match="goes on without") as caught:
        fast = optimise(stock, passes=[Swapped(), Louder(), "rotary"])
    said = [str(warning.message) for warning in caught if "goes on without" in str(warning.message)]
    assert [sentence.split()[1] for sentence in said] == ["fuse_gate_up", "louder"]
    assert outcome_of(fast, "rotary").matched == 2
    assert generate(fast) == before.tokens


@pytest.mark.usefixtures("quick")
def test_a_wrong_pass_that_is_needed(stock: Any, before: State) -> None:
    """There is no result without it, strict or not."""
    with pytest.raises(VerificationError, match="with static_kv applied"):
        optimise(stock, passes={"static_kv": WrongRows()})
    assert_untouched(stock, before)


@pytest.mark.usefixtures("quick")
def test_without_verification_a_wrong_pass_stays(stock: Any) -> None:
    """``verify="off"`` trusts: nothing is compared, nothing is claimed."""
    fast = optimise(stock, passes=["fuse_qkv", Louder()], verify="off")
    assert outcome_of(fast, "louder").dropped is None
    assert fast.fxopt.report.checks == []


@pytest.mark.usefixtures("quick")
def test_no_pass_to_blame(stock: Any, before: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are right and the code made of them is not: said so, with the backend."""
    monkeypatch.setattr("fxopt.judge.Judge.engine", lambda *_, **__: (Check("", 1.0, 0.0), "the logits differ"))
    with pytest.raises(VerificationError, match=r"compiled by eager they do not: the logits differ.*backend="):
        optimise(stock, passes=FEW)
    assert_untouched(stock, before)


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
@pytest.mark.usefixtures("quick")
def test_fewer_places_than_expected(stock: Any, before: State, refuses: bool, matched: int, why: str) -> None:
    passes = [Hopeful(refuses=refuses)]
    sentence = f"hopeful matched {matched} of 7 places .*{why}.*strict=True asks for all"
    with pytest.raises(RewriteError, match=sentence):
        optimise(stock, passes=passes, strict=True)
    assert_untouched(stock, before)

    fast = optimise(stock, passes=passes)
    outcome = outcome_of(fast, "hopeful")
    assert (outcome.matched, outcome.expected, len(outcome.refused)) == (matched, 7, 3 - matched)
    assert generate(fast) == before.tokens
