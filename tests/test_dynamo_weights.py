"""Weights under ``torch.compile(backend="fxopt")``: packed, updated, moved, trained, never read when they are old."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from under_dynamo import Attention, assert_alike, compiled, counts, only_report, said, tokens

import fxopt
from fxopt.dynamo_backend import last_reports
from fxopt.families import tiny
from fxopt.seats import MOST_MOVES

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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
