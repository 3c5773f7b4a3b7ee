"""PyTorch's own tools see the passes: the off switch, the trace, the log, the history of nodes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config

import fxopt
from fxopt.families import tiny

SCRIPT = """
import fxopt
from fxopt.families import tiny
fxopt.optimize(tiny("llama", num_hidden_layers=1), 32, backend="eager", verify="off")
"""


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("listed", ["fuse_qkv", "other,FUSE_QKV"])
def test_the_off_switch(listed: str) -> None:
    """TORCHINDUCTOR_DISABLED_PASSES: the pass is left out, says why, and nothing else changes."""
    with config.patch(disabled_passes=listed):
        report = fxopt.optimize(tiny("llama"), 32, backend="eager").fxopt.report
    assert report["fuse_qkv"].dropped == "switched off by TORCHINDUCTOR_DISABLED_PASSES"
    assert report["fuse_qkv"].matched == 0
    assert report["fuse_gate_up"].matched == 2
    assert report.before("fuse_gate_up").name == "window_kv"


def test_a_pass_that_is_needed_cannot_be_switched_off() -> None:
    sentence = "static_kv .*switched off by TORCHINDUCTOR_DISABLED_PASSES"
    with config.patch(disabled_passes="static_kv"), pytest.raises(fxopt.RewriteError, match=sentence):
        fxopt.optimize(tiny("llama"), 32, backend="eager")


def test_the_history_of_a_node() -> None:
    """With PyTorch's provenance tracking on, from_node names the pass that made a node."""
    with config.patch({"trace.provenance_tracking_level": 1}):
        fast = fxopt.optimize(tiny("llama"), 32, backend="eager", verify="off")
    made = [n for n in fast.fxopt.graphs["symbolic"].graph.nodes if "fuse_qkv" in n.meta.get("fxopt", ())]
    assert made
    histories = [[source.pass_name for source in node.meta.get("from_node", [])] for node in made]
    assert any("fuse_qkv" in history for history in histories)


def test_the_trace(tmp_path: Path) -> None:
    """TORCH_TRACE holds the graph after every stage, for tlparse."""
    run(TORCH_TRACE=str(tmp_path))
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("capture", "static_kv", "fuse_qkv", "specialise", "matvec"):
        assert f'"fxopt_{name}"' in text
    assert "index_copy_(key_0, 2, cache_position" in text


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fxopt"):
        fxopt.optimize(tiny("llama", num_hidden_layers=1), 32, backend="eager", verify="off")
    assert "fuse_qkv matched 1 of 1" in caplog.text
    done = run(TORCH_LOGS="+fxopt")
    assert "fuse_qkv matched 1 of 1" in done.stderr
    assert "fuse_qkv" not in run().stderr


def test_stamps_are_there_without_any_tool() -> None:
    fast = fxopt.optimize(tiny("llama"), 32, backend="eager", verify="off")
    writes = [n for n in fast.fxopt.graphs["symbolic"].graph.nodes if n.target is torch.ops.aten.index_copy_.default]
    assert [node.meta["fxopt"] for node in writes] == [("static_kv",)] * 4
