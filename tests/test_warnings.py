"""A warning names the user's own line, not one of fxopt's or of Transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import At, WrongInDecode
from words import word_tokenizer

import fxopt
from fxopt.cli import main
from fxopt.families import tiny
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.program import INPUT_IDS, Program


@dataclass(frozen=True)
class FailsOnSeveral(WrongInDecode):
    """Fails on the graph for several sequences, which is made when it is first needed."""

    name = "fails_on_several"

    def find(self, program: Program) -> Iterator[At]:
        if program.placeholders()[INPUT_IDS].meta["val"].shape[0] != 1:
            raise RuntimeError("injected")
        return iter(())


def assert_here(caught: pytest.WarningsRecorder, name: str) -> None:
    """One pass was dropped, and the warning is about a line of this file."""
    said = [warning for warning in caught if "goes on without it" in str(warning.message)]
    assert [str(warning.message).split()[0] for warning in said] == [name]
    assert [Path(warning.filename).name for warning in said] == [Path(__file__).name]


def failing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected")


def test_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FuseQKV, "find", failing)
    with pytest.warns(UserWarning, match="goes on without it") as caught:
        fxopt.optimize(tiny("llama", num_hidden_layers=1), 32, backend="eager", passes=["fuse_qkv"])
    assert_here(caught, "fuse_qkv")


def test_generate_that_makes_one_more_graph() -> None:
    """Between the user and fxopt stands ``generate`` of Transformers."""
    fast = fxopt.optimize(tiny("llama", num_hidden_layers=1), 32, backend="eager", passes=[FailsOnSeveral()])
    with pytest.warns(UserWarning, match="goes on without it") as caught:
        fast.generate(torch.full((3, 4), 5), max_new_tokens=4, do_sample=False)
    assert_here(caught, "fails_on_several")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens go to standard output all the same."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which main sets for a process of its own
    monkeypatch.setattr(FuseQKV, "find", failing)
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    options = ["--prompt", "w5 w17", "--backend", "eager", "--max-len", "32", "--max-new-tokens", "4"]
    with pytest.warns(UserWarning, match="goes on without it") as caught:
        assert main(["generate", str(tmp_path), *options]) == 0
    assert_here(caught, "fuse_qkv")
    assert len(capsys.readouterr().out.split()) >= 4
