"""``torch.compile(model, backend="fxopt")``: any model gives what it gave, whatever becomes of its weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from torch._dynamo import list_backends, lookup_backend
from transformers import AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5Model

import fxopt
from fxopt import dynamo_backend, dynamo_graph
from fxopt.dynamo_backend import GraphReport, last_reports
from fxopt.families import VOCABULARY, tiny
from fxopt.passes.fuse_qkv import FuseQKV, Projections
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.seats import MOST_MOVES

WITHOUT_INDUCTOR: dict[str, Any] = {"backend": "aot_eager"}
NOTHING = "the passes found nothing that the compiler would not do itself"

#: What is rewritten in the two layers of each: groups of heads, q/k/v, gate/up.
COUNTS = {
    "llama": (2, 2, 2),
    "gemma2": (2, 2, 2),
    "gpt2": (0, 0, 0),
    "gpt_neo": (0, 2, 0),
    "mixtral": (2, 2, 0),
    "qwen3": (2, 2, 2),
    "phi": (2, 2, 0),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    dynamo_backend._reports.clear()
    yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fxopt", options=WITHOUT_INDUCTOR | options)


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """With the first token of the first row masked, so that attention has a mask."""
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    found: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return found


def assert_alike(fast: Any, stock: Any, ids: Tensor | None = None) -> None:
    ids = tokens() if ids is None else ids
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


def counts(report: GraphReport) -> tuple[int, ...]:
    return tuple(report[name].matched for name in ("grouped_attention", "fuse_qkv", "fuse_gate_up"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fxopt"]


def only_report() -> GraphReport:
    (report,) = last_reports()
    return report


@pytest.mark.parametrize("family", COUNTS)
def test_families_give_what_they_gave(family: str) -> None:
    model = tiny(family)
    fast = compiled(model)
    for batch, length in ((2, 7), (3, 9), (4, 12)):
        assert_alike(fast, model, tokens(batch, length))
    assert_alike(model, tiny(family))  # the stock model is as it was
    for report in last_reports():
        assert counts(report) == COUNTS[family]
        assert report.left_alone == (None if any(COUNTS[family]) else NOTHING)


def test_what_was_done_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fxopt"):
        logits(compiled(tiny("llama")), tokens())
    report = only_report()
    assert any("fuse_qkv: 2 rewritten" in message for message in said(caplog))
    assert "packed weights: 192KB, no second copy" in str(report)
    assert report["fuse_qkv"].sites[0].source.startswith("modeling_")
    assert [site.layer for site in report["fuse_gate_up"].sites] == [0, 1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache(cache: str) -> None:
    model, stock = tiny("llama"), tiny("llama")
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache == "static":
        asked |= {"cache_implementation": "static", "disable_compile": True}
    model.forward = compiled(model.forward)
    assert model.generate(tokens(), **asked).tolist() == stock.generate(tokens(), **asked).tolist()
    grouped = 0 if cache == "dynamic" else 2  # without a mask Transformers itself expands no heads
    assert counts(last_reports()[-1]) == (grouped, 2, 2)


def test_marked_sizes_compile_once() -> None:
    model: Any = tiny("llama")
    fast: Any = torch.compile(model, backend="fxopt", fullgraph=True, options=WITHOUT_INDUCTOR)
    for batch, length in ((2, 7), (3, 9), (5, 21)):
        ids = tokens(batch, length)
        mask = torch.ones_like(ids)
        for tensor in (ids, mask):
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 1)
        with torch.no_grad():
            found = fast(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found, model(ids, attention_mask=mask, use_cache=False).logits)
    assert counts(only_report()) == (2, 2, 2)


def test_numbers_may_be_symbols_too() -> None:
    """Under ``dynamic=True`` Dynamo hands in every float of the model."""
    model = tiny("llama")
    fast = torch.compile(model, backend="fxopt", dynamic=True, options=WITHOUT_INDUCTOR)
    for length in (7, 9):
        assert_alike(fast, model, tokens(2, length))
    assert counts(last_reports()[-1]) == (2, 2, 2)


def test_two_models_and_one_twice() -> None:
    first, second = tiny("llama"), tiny("llama")
    with torch.no_grad():
        second.lm_head.weight.mul_(2)
    faces = [(compiled(first), first), (compiled(second), second), (compiled(first), first)]
    for _ in range(2):
        for fast, stock in faces:
            assert_alike(fast, stock)
    copied = copy.deepcopy(first)
    assert_alike(compiled(copied), tiny("llama"))


def storage_bytes(model: nn.Module) -> int:
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_weights_are_packed_without_a_copy_and_saved_as_they_were(tmp_path: Path) -> None:
    model, stock = tiny("llama"), tiny("llama")
    assert_alike(compiled(model), stock)
    assert model.model.layers[0].self_attn.q_proj.weight.untyped_storage().nbytes() == (64 + 32 + 32) * 64 * 4
    assert storage_bytes(model) == storage_bytes(stock)
    before, after = stock.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path)
    assert_alike(AutoModelForCausalLM.from_pretrained(tmp_path), stock)
    assert_alike(fxopt.optimize(model, max_len=32, backend="eager", verify="off"), stock)  # packs nothing anew


def test_updates_in_place_are_seen() -> None:
    model = tiny("llama")
    fast = compiled(model)
    assert_alike(fast, model)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.k_proj.weight.mul_(2)
        layer.mlp.up_proj.weight[3:5] += 1
    assert_alike(fast, model)
    model.load_state_dict({name: value * 1.5 for name, value in tiny("llama").state_dict().items()})
    assert_alike(fast, model)
    assert len(last_reports()) == 1


def test_weights_that_move_are_packed_again() -> None:
    model = tiny("llama")
    fast = compiled(model)
    assert_alike(fast, model)
    layer = model.model.layers[1]
    state = tiny("llama").state_dict()
    model.load_state_dict({name: value * 1.5 for name, value in state.items()}, assign=True)
    assert_alike(fast, model)
    layer.mlp.gate_proj.weight = nn.Parameter(torch.randn(128, 64))
    assert_alike(fast, model)
    layer.self_attn.q_proj.weight.data = torch.randn(64, 64)
    assert_alike(fast, model)
    packed = layer.self_attn.q_proj.weight.untyped_storage()
    assert packed.data_ptr() == layer.self_attn.v_proj.weight.untyped_storage().data_ptr()
    assert len(last_reports()) == 1
    assert_alike(fast, model.double())
    assert_alike(fast, model.float())


def test_weights_that_never_rest(caplog: pytest.LogCaptureFixture) -> None:
    """Past some packings the graph runs as it came, with other sizes too."""
    model = tiny("llama")
    fast = compiled(model)
    for _ in range(MOST_MOVES + 2):
        model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(64, 64)
        assert_alike(fast, model)
    assert [message for message in said(caplog) if "moved" in message] == [
        f"the weights are not packed (they have moved {MOST_MOVES} times), so the graph runs as it was before any pass"
    ]
    for batch, length in ((3, 9), (1, 5), (2, 7)):
        assert_alike(fast, model, tokens(batch, length))


def test_a_weight_that_may_not_move() -> None:
    """One that shares its memory with something else stays, at first and later on."""
    model = tiny("llama")
    everything = torch.randn(2, 64, 64)
    layers = model.model.layers
    layers[0].self_attn.q_proj.weight.data = everything[0]
    fast = compiled(model)
    assert_alike(fast, model)
    assert counts(only_report()) == (2, 1, 2)
    assert "part of a larger storage" in only_report()["fuse_qkv"].refused[0].reason
    layers[1].self_attn.q_proj.weight.data = everything[1]
    assert_alike(fast, model)
    everything.mul_(2)
    assert_alike(fast, model)
    assert layers[1].self_attn.q_proj.weight.data_ptr() == everything[1].data_ptr()


def test_gradients_are_those_of_the_stock_model() -> None:
    model, stock = tiny("llama").train(), tiny("llama").train()
    fast = compiled(model)
    for _ in range(2):
        for one in (fast, stock):
            one(tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad)
        assert_alike(fast, stock)  # without gradients: packs the weights that are trained on
        for one in (model, stock):
            torch.optim.SGD(one.parameters(), lr=0.01).step()
            one.zero_grad()
    assert_alike(fast, stock)
    reasons = {report.left_alone for report in last_reports()}
    assert reasons == {None, "it may be differentiated; call the model under torch.no_grad() for the passes"}


def test_weights_may_be_packed_before_a_backward_pass() -> None:
    model, stock = tiny("llama"), tiny("llama")
    fast = compiled(model)
    losses = [one(tokens(), labels=tokens()).loss for one in (fast, stock)]
    assert_alike(fast, stock)
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad)


def test_weights_packed_in_inference_mode_can_be_trained() -> None:
    model = tiny("llama")
    fast = compiled(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(tokens()).logits, model(tokens()).logits)
    assert counts(only_report())[1:] == (2, 2)
    fast(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@dataclass(frozen=True)
class Raises(Pass[Projections]):
    name = "raises"
    summary = "fails"

    def find(self, program: Program) -> Iterator[Projections]:
        raise KeyError("input_ids")


@dataclass(frozen=True)
class Transposes(Pass[Projections]):
    name = "transposes"
    summary = "hands out something that looks otherwise"

    def finish(self, program: Program, matched: int) -> None:
        with program.graph.inserting_before(program.output()):
            other = program.graph.call_function(torch.ops.aten.transpose.int, (program.logits(), 0, 1))
        program.output().args = ((other, *program.results()[1:]),)

    def find(self, program: Program) -> Iterator[Projections]:
        return iter(())


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Raises(), "raises failed with KeyError: 'input_ids'"),
        (Transposes(), "transposes changed dtypes, shapes or strides of what the graph hands out"),
    ],
)
def test_a_broken_pass_falls_through(broken: Pass[Any], sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    assert_alike(compiled(model, passes=["fuse_qkv", broken]), tiny("llama"))
    assert only_report().left_alone == f"RewriteError: {sentence}"
    assert said(caplog) == [f"graph {only_report().number} goes to aot_eager as it came, RewriteError: {sentence}"]
    assert model.model.layers[0].self_attn.q_proj.weight.untyped_storage().nbytes() == 64 * 64 * 4


@pytest.mark.parametrize(("where", "name"), [(dynamo_graph, "make_fx"), (dynamo_backend, "lifted")])
def test_a_failure_on_the_way_falls_through(
    where: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(where, name, fails)
    model = tiny("llama")
    assert_alike(compiled(model), model)
    assert only_report().left_alone == "RuntimeError: no"
    assert said(caplog) == [f"graph {only_report().number} goes to aot_eager as it came, RuntimeError: no"]


@pytest.mark.parametrize(
    ("passes", "applied"),
    [
        (None, {"remove_control_flow", "grouped_attention", "fuse_qkv", "fuse_gate_up"}),
        ("default", {"remove_control_flow", "grouped_attention", "fuse_qkv", "fuse_gate_up"}),
        ("minimal", {"remove_control_flow"}),
        (["fuse_qkv"], {"remove_control_flow", "fuse_qkv"}),
        ({"fuse_qkv": False, "static_kv": False}, {"remove_control_flow", "grouped_attention", "fuse_gate_up"}),
        ({"remove_control_flow": False}, {"grouped_attention", "fuse_qkv", "fuse_gate_up"}),
        ([FuseQKV(), Raises], {"remove_control_flow", "fuse_qkv", "raises"}),
        ([fxopt.Only(FuseQKV(), [1])], {"remove_control_flow", "fuse_qkv"}),
    ],
)
def test_passes_are_selected_as_for_optimize(passes: Any, applied: set[str]) -> None:
    assert {rewriter.name for rewriter in dynamo_backend.selected(passes)} == applied


def test_a_pass_at_some_places_only() -> None:
    model = tiny("llama")
    assert_alike(compiled(model, passes={"fuse_qkv": fxopt.Only(FuseQKV(), [1])}), model)
    assert counts(only_report()) == (2, 1, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"passes": ["static_kv"]}, "static_kv is for graphs that fxopt.optimize makes, so torch.compile cannot"),
        ({"passes": {"matvec": True}}, "matvec is for graphs that fxopt.optimize makes"),
        ({"passes": ["fuse_qkw"]}, "no pass named 'fuse_qkw'; did you mean fuse_qkv?"),
        ({"passes": 3}, "passes=3 is neither a preset"),
        ({"backend": "fxopt"}, "goes in a circle"),
        ({"backend": "aot_eager", "max_autotune": True}, "max_autotune cannot be set for aot_eager"),
        ({"max_autotunes": True}, "no option 'max_autotunes', neither of fxopt nor of Inductor; did you mean"),
    ],
)
def test_a_request_that_cannot_be_served(options: dict[str, Any], sentence: str) -> None:
    fast = torch.compile(nn.Linear(2, 2).requires_grad_(False), backend="fxopt", options=options)
    with pytest.raises(Exception, match=sentence.replace("?", r"\?")):
        fast(torch.ones(1, 2))


def test_modes_are_those_of_inductor() -> None:
    compiler = dynamo_backend._asked("max-autotune", None)[1]
    assert dict(compiler.settings)["max_autotune"] is True


def test_pytorch_knows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."torch_dynamo_backends"]\nfxopt = "fxopt.dynamo_backend:backend"\n' in project
    assert "fxopt" in list_backends()
    assert lookup_backend("fxopt") is dynamo_backend.backend

    known: list[str] = []
    monkeypatch.setattr(dynamo_backend, "entry_points", lambda **_: ())
    monkeypatch.setattr(dynamo_backend, "register_backend", lambda function, name: known.append(name))
    dynamo_backend._make_known()
    assert known == ["fxopt"]


class Attention(nn.Module):
    """Attention of no language model, with one twist at a time."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.twist = twist
        if twist == "tied":
            self.k.weight = self.q.weight

    def forward(self, x: Tensor) -> Any:
        batch, step, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, step, 4, -1).transpose(1, 2)

        if self.twist == "input written":
            x = x.clone()
            same = x.view(batch, step, 32)
            q = self.q(same)
            x.add_(1)
            q, k, v = heads(q), heads(self.k(same)), heads(self.v(same))
        else:
            q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.twist == "products":
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        if self.twist == "read twice":
            mixed = mixed + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.o(mixed.transpose(1, 2).reshape(batch, step, 32))
        if self.twist == "handed out":
            return y, k
        if self.twist == "copied":
            return y, y.clone(), x[:]
        return y


@pytest.mark.parametrize(
    ("twist", "matched", "reason"),
    [
        ("", 1, ""),
        ("products", 1, ""),
        ("copied", 1, ""),
        ("read twice", 1, "other attention reads the same projections"),
        ("input written", 0, "view is written into between them"),
        ("handed out", 0, "linear_1 is handed out, and would be a part of a larger tensor"),
        ("tied", 0, "two of them are the same memory"),
    ],
)
@torch.no_grad()
def test_any_program(twist: str, matched: int, reason: str) -> None:
    """No language model, and things that a captured one never does."""
    model = Attention(twist)
    stock = copy.deepcopy(model)
    fast = compiled(model)
    for shape in ((2, 5, 32), (3, 6, 32)):
        x = torch.randn(shape)
        found, wanted = fast(x), stock(x)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.stride() == other.stride()
    assert last_reports()[-1]["fuse_qkv"].matched == matched
    outcome = last_reports()[0]["fuse_qkv"]
    assert reason in " ".join(spot.reason for spot in (*outcome.refused, *outcome.near))
    if twist == "copied":
        found[1].zero_()
        torch.testing.assert_close(found[0], wanted[0])


class Gated(nn.Module):
    """A gated product behind some control flow, with a buffer that is written."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.gate, self.up, self.norm = nn.Linear(8, 12), nn.Linear(8, 12), nn.BatchNorm1d(12)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "arithmetic":
                x = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: torch.sin(x) - 1, (x,))
            case "may fail":
                x = torch.cond(x.sum() > 0, lambda x: x[:, torch.arange(8)], lambda x: x - 1, (x,))
            case "check":
                torch._assert_async(x.sum() < 100, "too much")
                x = x + torch.tensor([1.0] * 8)
            case "silent check":
                torch._assert_async(x.sum() < 100)
            case "vmap":
                x = torch.vmap(lambda row: row * row.sum())(x)
            case "no_grad":
                with torch.no_grad():
                    x = x * 2
            case "autocast off":
                with torch.autocast("cpu", enabled=False):
                    x = x * 2
            case "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = (x @ torch.eye(8)).float()
        return self.norm(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "inlined", "left_alone"),
    [
        ("", 0, None),
        ("arithmetic", 1, None),
        ("may fail", 0, None),
        ("check", 0, None),
        ("silent check", 0, "_assert_async is called for what it does, not for what it returns"),
        ("vmap", 0, "belongs to a transform of torch.func"),
        ("no_grad", 0, None),
        ("autocast off", 0, None),
        ("autocast", 0, "_enter_autocast switches autocast on"),
    ],
)
def test_control_flow(kind: str, inlined: int, left_alone: str | None) -> None:
    model = Gated(kind).requires_grad_(False)
    stock = copy.deepcopy(model)
    fast = compiled(model)
    for sign in (1, -1, 1):
        x = torch.randn(5, 8) * 0.1 + sign
        torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.norm.running_mean, stock.norm.running_mean)
    report = only_report()
    assert (left_alone or "None") in str(report.left_alone)
    if left_alone is None:
        assert report["fuse_gate_up"].matched == 1
        assert -report["remove_control_flow"].ops.get("cond", 0) == inlined
    if kind == "check":
        with pytest.raises(RuntimeError, match="too much"):
            fast(torch.full((5, 8), 10.0))


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"}


@pytest.mark.parametrize(
    ("make", "inputs", "matched"),
    [
        (lambda: BertModel(BertConfig(**SMALL, intermediate_size=128)), ("input_ids",), (0, 2, 0)),
        (lambda: T5Model(T5Config(vocab_size=VOCABULARY, **GATED_T5)), ("input_ids", "decoder_input_ids"), (0, 2, 2)),
    ],
    ids=["bert", "t5"],
)
@torch.no_grad()
def test_other_transformers(make: Callable[[], Any], inputs: tuple[str, ...], matched: tuple[int, ...]) -> None:
    """An encoder; and a model with cross-attention, whose query reads another input than key and value do."""
    model = make().eval()
    arguments = {name: tokens() for name in inputs}
    wanted = model(**arguments).last_hidden_state
    torch.testing.assert_close(compiled(model)(**arguments).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    assert counts(only_report()) == matched


def test_autocast_is_left_alone() -> None:
    model = Attention()
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert only_report().left_alone == "autocast is on"


def test_what_has_no_weights_is_left_alone() -> None:
    fast = compiled(lambda x: torch.relu(x).sum())
    assert fast(torch.ones(3)) == 3
    assert only_report().left_alone == NOTHING


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_through_inductor(family: str) -> None:
    model, stock = tiny(family), tiny(family)
    fast = torch.compile(model, backend="fxopt")
    for batch, length in ((2, 7), (3, 9), (4, 11)):
        assert_alike(fast, stock, tokens(batch, length))
    assert all(counts(report) == COUNTS[family] and report.left_alone is None for report in last_reports())


@pytest.mark.slow
def test_weights_move_under_inductor() -> None:
    model = tiny("llama")
    fast = torch.compile(model, backend="fxopt", mode="max-autotune-no-cudagraphs")
    assert_alike(fast, model)
    model.load_state_dict({n: v * 1.5 for n, v in tiny("llama").state_dict().items()}, assign=True)
    assert_alike(fast, model)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(2)
    assert_alike(fast, model)
    for _ in range(MOST_MOVES):
        model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(64, 64)
        assert_alike(fast, model)


@pytest.mark.slow
def test_frozen_weights_under_inductor() -> None:
    """Inductor's own freezing keeps copies of weights; what is packed is no copy that it could keep."""
    model = Attention().eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        fast = torch.compile(model, backend="fxopt", options={"freezing": True})
        torch.testing.assert_close(fast(x), model(x))
