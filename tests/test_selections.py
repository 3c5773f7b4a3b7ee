"""Which passes a request selects, in which order, and which selections are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sentences import assert_sentence
from torch import nn

import fxopt
from fxopt.admission import PRESETS, select
from fxopt.errors import InvalidRequestError
from fxopt.passes import DEFAULT_PASSES, PASSES
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.rotary import Rotary
from fxopt.program import Program
from fxopt.rewrite import Located, Pass, Stage

EVERY = [kind.name for kind in PASSES]
NAMES = [kind.name for kind in DEFAULT_PASSES]
REQUIRED = [kind.name for kind in PASSES if kind.required]
OPTIONAL = [kind.name for kind in DEFAULT_PASSES if not kind.required]


@dataclass(frozen=True)
class Mine(Pass[Located]):
    """A user's own pass, with an option."""

    name = "mine"
    summary = "does nothing"
    stage = Stage.SYMBOLIC
    strength: int = 1

    def find(self, program: Program) -> Iterator[Located]:
        yield from ()


def names(selection: Any) -> list[str]:
    return [rewriter.name for rewriter in select(selection)]


def without(*left_out: str) -> list[str]:
    return [name for name in NAMES if name not in left_out]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, NAMES),
        ("default", NAMES),
        ("minimal", REQUIRED),
        ({}, NAMES),
        ({"fuse_qkv": False}, without("fuse_qkv")),
        ({"fuse_qkv": False, "rotary": True, "matvec": False}, without("fuse_qkv", "matvec")),
        ({"rotary": {}}, NAMES),
        ({"rotary": Rotary()}, NAMES),
        ([], REQUIRED),
        (["rotary", "fuse_qkv"], [*REQUIRED, "fuse_qkv", "rotary"]),
        (("static_kv", "rotary", "rotary"), [*REQUIRED, "rotary"]),
        ([FuseQKV], [*REQUIRED, "fuse_qkv"]),
        ([FuseQKV()], [*REQUIRED, "fuse_qkv"]),
        ([Mine(), "rotary"], [*REQUIRED, "rotary", "mine"]),
        ([Mine], [*REQUIRED, "mine"]),
        ((name for name in NAMES), NAMES),
        (PASSES, EVERY),
        ({"plan_memory": True}, [*NAMES, "plan_memory"]),
        ({"plan_memory": {}, "rotary": False}, [*without("rotary"), "plan_memory"]),
        (
            {
                "plan_memory": {},
                "offload_weights": {"budget": "8GiB"},
                "offload_kv": {"resident": 0.0},
                "quantize_kv": {"kv_dtype": "int4"},
                "quantize_weights": {"dtype": "int4", "group": 16, "lm_head": None},
            },
            EVERY,
        ),
        ({"plan_memory": False}, NAMES),
    ],
)
def test_selections(selection: Any, expected: list[str]) -> None:
    """Always in pipeline order, required ones always there, a user's own last."""
    assert names(selection) == expected


def test_every_optional_pass_can_be_left_out() -> None:
    assert names({name: False for name in OPTIONAL}) == REQUIRED
    assert set(PRESETS) == {"default", "minimal"}


def test_objects_are_taken_as_they_are() -> None:
    own, rotary = Mine(strength=3), Rotary()
    selected = {rewriter.name: rewriter for rewriter in select([own, rotary])}
    assert selected["mine"] is own
    assert selected["rotary"] is rotary
    assert next(rewriter for rewriter in select({"rotary": rotary}) if rewriter.name == "rotary") is rotary


def test_options_reach_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.admission.catalogue", lambda: (*PASSES, Mine))
    mine = {rewriter.name: rewriter for rewriter in select({"mine": {"strength": 5}})}["mine"]
    assert mine == Mine(strength=5)
    with pytest.raises(InvalidRequestError) as raised:
        select({"mine": {"strenght": 5}})
    assert_sentence(raised.value, "mine does not take these options", "'strenght'")


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("minimum", ["no preset named 'minimum'", "did you mean minimal?"]),
        ("zzz", ["no preset named 'zzz'", "there are default, minimal"]),
        (["rotery"], ["no pass named 'rotery'", "did you mean rotary?"]),
        (["fuse"], ["no pass named 'fuse'"]),
        (["zzz"], ["no pass named 'zzz'", *NAMES]),
        ({"window": False}, ["no pass named 'window'", "window_kv"]),
        ({3: False}, ["no pass named 3", *NAMES]),
        ({"static_kv": False}, ["static_kv cannot be left out", *OPTIONAL]),
        ({"remove_control_flow": False}, ["remove_control_flow cannot be left out"]),
        ({"rotary": None}, ["passes['rotary'] is None", "True, False, options or a pass object"]),
        ({"rotary": 1}, ["passes['rotary'] is 1", "True, False, options or a pass object"]),
        ({"rotary": {"speed": 1}}, ["rotary does not take these options", "'speed'"]),
        ([7], ["7 is no pass", "a name, a pass class or a pass object"]),
        ([nn.Linear], ["is no pass"]),
    ],
    ids=str,
)
def test_bad_selections(selection: Any, words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        select(selection)
    assert_sentence(raised.value, *words)


def test_a_selection_that_is_no_collection() -> None:
    with pytest.raises(fxopt.InvalidRequestError, match="5"):
        select(5)  # type: ignore[arg-type]
