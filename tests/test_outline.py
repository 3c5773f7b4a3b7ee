"""Graphs cut at their layers: how many pieces of how many kinds, and that they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.admission import select
from fxopt.cache import BufferSet
from fxopt.chain import Chain, Plan, Step
from fxopt.families import VOCABULARY, tiny
from fxopt.lower import lower
from fxopt.outline import outline, pieces
from fxopt.pipeline import Pipeline, Policy
from fxopt.program import Program
from fxopt.request import Request
from fxopt.specialise import Role, specialise

LAYERS, MAX_LEN = 4, 96
ROLES = (
    Role("decode", 1, longest_step=1),
    Role("decode", None, longest_step=1),
    Role("prefill", 1, longest_step=32),
    Role("verify", None, longest_step=16, all_logits=True),
)

#: Kinds of pieces: what all share, the layers, the head. Cohere2 rotates in every second layer only.
KINDS = {"llama": 3, "gemma3_text": 3, "gpt2": 3, "bloom": 3, "cohere2": 4}


def rewritten(family: str, layers: int = LAYERS) -> Program:
    pipeline = Pipeline(select(None), Request(MAX_LEN, compile="layer").captured(tiny(family, layers=layers)), Policy())
    pipeline.run()
    return pipeline.program


@pytest.mark.parametrize("family", KINDS)
def test_one_piece_for_each_layer(family: str) -> None:
    program = rewritten(family)
    for role in ROLES:
        regions = outline(specialise(program, role), layered=True)
        assert len(regions) == LAYERS + 2, role
        assert len({region.key for region in regions}) == KINDS[family], role
        assert all(len(region.outputs) == 1 for region in regions[1:]), role  # the hidden state alone is handed on


@pytest.mark.parametrize("family", ["llama", "gptj", "mixtral"])
def test_the_pieces_compute_what_the_whole_computes(family: str) -> None:
    symbolic = rewritten(family)
    for role in (ROLES[0], ROLES[-1]):
        program = specialise(symbolic, role)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        assert sorted(node for part in pieces(program, layered=True) for node in part) == calls
        whole, layered = (run(program, role, layered=choice) for choice in (False, True))
        for one, other in zip(whole, layered, strict=True):
            assert torch.equal(one, other)


def test_few_layers_are_one_piece() -> None:
    program = specialise(rewritten("llama", layers=2), ROLES[0])
    assert len(pieces(program, layered=True)) == 1


def test_every_call_is_in_one_piece_of_the_captured_graph() -> None:
    program = Request(MAX_LEN, compile="layer").captured(tiny("llama", layers=4))
    nodes = [node for part in pieces(program, layered=True) for node in part]
    assert len(nodes) == len(set(nodes)) == sum(node.op == "call_function" for node in program.graph.nodes)


def test_values_are_let_go_after_their_last_reader() -> None:
    plan = Plan(("a",), (), (Step(0, (0,), (1,)), Step(0, (1,), (2,)), Step(0, (2,), (3,))), (3,)).freeing()
    assert [step.frees for step in plan.steps] == [(), (1,), (2,)]
    assert Chain(plan, [lambda value: (value + 1,)])(torch.zeros(1))[0].item() == 3


def run(program: Program, role: Role, *, layered: bool) -> list[torch.Tensor]:
    """Logits and buffers after one step on buffers that are half full."""
    batch, step, filled = role.batch or 3, min(5, role.longest_step), 40
    generator = torch.Generator().manual_seed(1)
    buffers = BufferSet(program.facts, batch)
    for tensor in buffers.tensors.values():
        tensor[:, :, : filled - step].normal_(generator=generator)
    buffers.mask[:, :filled] = 1
    rows = torch.arange(filled - step, filled)
    tensors: dict[str, Any] = {
        "input_ids": torch.randint(3, VOCABULARY, (batch, step), generator=generator),
        "attention_mask": buffers.mask[:, :64],
        "position_ids": rows.repeat(batch, 1),
        "cache_position": rows,
        "logit_positions": torch.arange(step) if role.all_logits else torch.tensor([step - 1]),
    }
    tensors |= buffers.tensors
    with torch.no_grad():
        logits = lower(program, "aot_eager", layered=layered)(tensors)
    return [logits, *buffers.tensors.values()]
