"""The passes and places that make a check fail are found, all of them and no others."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node

import fxopt
from fxopt.culprit import NothingToFindError
from fxopt.families import tiny
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.offload_kv import OffloadKV
from fxopt.passes.offload_weights import OffloadWeights
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.smallest import smallest

aten = torch.ops.aten
LAYERS = 4
MAX_LEN = 48


@dataclass(frozen=True)
class Norm:
    node: Node


@dataclass(frozen=True)
class Louder(Pass[Norm]):
    """Multiplies the scale of norms; wrong at one of them only."""

    name = "louder"
    summary = "broken at one place"
    wrong: int = 5

    def find(self, program: Program) -> Iterator[Norm]:
        for node in program.graph.nodes:
            if node.target is aten.rsqrt.default:
                yield Norm(node)

    def rewrite(self, program: Program, site: Norm) -> None:
        number = [node for node in program.graph.nodes if node.target is aten.rsqrt.default].index(site.node)
        with program.graph.inserting_after(site.node):
            scaled = program.graph.call_function(aten.mul.Tensor, (site.node, -3.0 if number == self.wrong else 1.0))
        site.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny("llama", num_hidden_layers=LAYERS)


def same_tokens(stock: Any) -> fxopt.SameTokens:
    return fxopt.SameTokens.of(stock, [list(range(3, 20))], max_new_tokens=20)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
def test_the_smallest_part(count: int) -> None:
    """Against every choice of culprits among few items, and random ones among many."""
    items = list(range(count))
    chooser = random.Random(count)
    for _ in range(30):
        culprits = set(chooser.sample(items, chooser.randint(1, min(3, count))))
        trials: list[int] = []

        def fails(part: Sequence[int], culprits: set[int] = culprits, trials: list[int] = trials) -> bool:
            trials.append(len(part))
            return culprits <= set(part)

        assert set(smallest(items, fails)) == culprits
        if len(culprits) == 1:
            assert len(trials) <= 2 * count.bit_length() + 2


def test_one_place_of_one_pass(stock: Any, tmp_path: Path) -> None:
    passes: list[Any] = ["fuse_qkv", "fuse_gate_up", "rotary", Louder()]
    culprit = fxopt.bisect(stock, same_tokens(stock), MAX_LEN, passes=passes)
    assert [p.name for p in culprit.passes] == ["louder"]
    assert [site.split(",")[0] for site in culprit.sites["louder"]] == ["layer 2"]  # the sixth norm
    assert "rsqrt_5" in str(culprit)
    assert "new token" in culprit.complaint
    assert culprit.trials < 30

    # The place is the place: without it the check passes.
    others = fxopt.Only(Louder(), tuple(set(range(2 * LAYERS + 1)) - {5}))
    assert same_tokens(stock)(fxopt.optimize(stock, MAX_LEN, passes=[others], backend="eager", verify="off"))


@pytest.mark.slow
def test_among_passes_that_stream(stock: Any, tmp_path: Path) -> None:
    streaming = [kind(resident=0.5, folder=str(tmp_path)) for kind in (OffloadKV, OffloadWeights)]
    culprit = fxopt.bisect(
        stock,
        same_tokens(stock),
        MAX_LEN,
        passes=[fxopt.Only(Louder(), (5,)), *streaming],
        backend="aot_eager",
        compile="layer",
    )
    assert [p.name for p in culprit.passes] == ["louder"]
    assert "backend='aot_eager', verify=\"off\", chunk=256, compile='layer'" in culprit.reproduction.script()


def test_the_script_shows_the_fault(stock: Any, tmp_path: Path) -> None:
    """The script alone, in a process of its own: bad with the passes, good when the wrong one is mended."""
    stock.save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    culprit = fxopt.bisect(model, same_tokens(model), MAX_LEN, passes=["fuse_qkv", Louder()])
    script = tmp_path / "fault.py"
    culprit.save(script)
    module = Path(__file__).stem
    text = script.read_text().replace(f"from {Louder.__module__} import", f"from {module} import")
    script.write_text(text)
    assert str(tmp_path / "model") in text
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "DIFFERENT TOKENS" in done.stdout
    assert "the check is bad" in done.stdout


def test_two_passes_together(stock: Any) -> None:
    """A check that only fails when two passes are there finds both, whole."""

    def check(fast: Any) -> bool:
        if fast is stock:
            return True
        report = fast.fxopt.report
        names = {stage.name for stage in report.passes if stage.matched}
        return not {"fuse_qkv", "rotary"} <= names

    passes = ["grouped_attention", "fuse_qkv", "fuse_gate_up", "rotary", "last_logits"]
    culprit = fxopt.bisect(stock, check, MAX_LEN, passes=passes)
    assert [p.name for p in culprit.passes] == ["fuse_qkv", "rotary"]
    assert {name: len(sites) for name, sites in culprit.sites.items()} == {"fuse_qkv": 1, "rotary": 1}
    assert "put it here" in culprit.reproduction.script()  # a check that refers to what is around it


def test_the_needed_passes_alone(stock: Any) -> None:
    culprit = fxopt.bisect(stock, lambda model: model is stock, MAX_LEN)
    assert culprit.passes == ()
    assert "cannot be left out" in str(culprit)
    assert "put it here" in culprit.reproduction.script()  # a lambda cannot be written out


def test_nothing_to_find(stock: Any) -> None:
    with pytest.raises(NothingToFindError, match="the check passes with all of remove_control_flow, "):
        fxopt.bisect(stock, same_tokens(stock), MAX_LEN)
    with pytest.raises(fxopt.InvalidRequestError, match=r"fails on the stock model itself .*ZeroDivisionError"):
        fxopt.bisect(stock, lambda model: 1 // 0 == 0, MAX_LEN)


def test_an_interrupt_is_no_verdict(stock: Any) -> None:
    def check(model: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxopt.bisect(stock, check, MAX_LEN)


def test_only_some_sites(stock: Any) -> None:
    """``Only`` goes by the name of its pass and says of the other places that they were not chosen."""
    fast = fxopt.optimize(stock, MAX_LEN, passes=[fxopt.Only(FuseQKV(), (1, 3))], backend="eager")
    outcome = fast.fxopt.report["fuse_qkv"]
    assert (outcome.expected, outcome.matched) == (LAYERS, 2)
    assert [spot.layer for spot in outcome.sites] == [1, 3]
    assert {spot.layer for spot in outcome.refused} == {0, 2}
    assert all("not one of the chosen sites" in spot.reason for spot in outcome.refused)
