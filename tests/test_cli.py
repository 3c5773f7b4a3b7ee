"""The command line: what it prints where, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fxopt.cli import main
from fxopt.families import tiny
from fxopt.passes import PASSES

PROMPT = "w5 w17 w40"
NEW = 12
OPTIONS = ["--backend", "eager", "--max-len", "32", "--max-new-tokens", str(NEW)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waiting for a second thread takes longer than the work of a tiny model."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which main sets for a process of its own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one word per token, as from_pretrained wants them."""
    path = tmp_path_factory.mktemp("model")
    model: Any = tiny("llama", num_hidden_layers=1)
    model.save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def answer(folder: Path) -> str:
    """What the stock model says, read back from the same folder."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(text.split()) > 3
    return text


def test_passes_lists_all_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [line for line in printed.out.splitlines() if line.split()[:1] and line.split()[0] in _names()]
    assert [row.split()[0] for row in rows] == _names()
    for kind, row in zip(PASSES, rows, strict=True):
        assert kind.summary in row
        assert kind.stage.value in row
        assert ("needed" in row) == kind.required
        assert (f"--no-{kind.name.replace('_', '-')}" in row) != kind.required


def _names() -> list[str]:
    return [kind.name for kind in PASSES]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "generate", "passes"]),
        (["passes", "--help"], ["usage: fxopt passes"]),
        (["demo", "--help"], ["--prompt", "--max-len"]),
        (["generate", "--help"], ["MODEL", "--report", "--backend", "--no-fuse-qkv", "--no-matvec", "--passes"]),
    ],
    ids=" ".join,
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(word in printed.out for word in words), printed.out


def test_required_passes_have_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "--no-static-kv" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required", "COMMAND"]),
        (["generate", "x"], ["--prompt"]),
        (["generate", "x", "--prompt", "y", "--backend", "fast"], ["--backend", "'fast'"]),
        (["generate", "x", "--prompt", "y", "--max-len", "many"], ["--max-len", "'many'"]),
        (["optimise"], ["'optimise'", "demo"]),
    ],
    ids=" ".join,
)
def test_arguments_that_are_not_understood(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words), printed.err


def assert_one_sentence(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Nothing on stdout, one line on stderr."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fxopt: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--passes", "fuze_qkv"], ["no pass named 'fuze_qkv'", "did you mean fuse_qkv?"]),
        (["--passes", "rotary,nothing"], ["no pass named 'nothing'", "there are"]),
        (["--max-len", "0"], ["max_len=0", "at least 2"]),
        (["--max-len", "100000"], ["max_len=100000", "256 positions"]),
        (["--max-len", "8", "--max-new-tokens", "30"], ["prompt of 3 tokens", "30 new", "max_len is 8"]),
    ],
    ids=" ".join,
)
def test_requests_that_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(["generate", str(folder), "--prompt", PROMPT, "--backend", "eager", *options]) == 2
    assert_one_sentence(capsys, *words)


def test_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", PROMPT]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fxopt: ")
    assert "nothing" in printed.err


def test_an_interrupt(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.api.capture", interrupted)
    assert main(["generate", str(folder), "--prompt", PROMPT, *OPTIONS]) == 130
    assert_one_sentence(capsys, "interrupted")


def test_generate_prints_the_answer_alone(folder: Path, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", PROMPT, *OPTIONS]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{answer}\n"
    assert printed.err == ""


def test_generate_with_a_report(folder: Path, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The report goes to stderr, without the pass that was left out."""
    arguments = ["generate", str(folder), "--prompt", PROMPT, *OPTIONS, "--no-fuse-qkv", "--strict", "--report"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{answer}\n"
    assert "LlamaForCausalLM, max_len 32, backend eager" in printed.err
    assert "verified the graphs" in printed.err
    first_words = {line.split()[0] for line in printed.err.splitlines() if line.strip()}
    assert set(_names()) - first_words == {"fuse_qkv"}


@pytest.mark.parametrize("passes", ["minimal", "fuse_gate_up"])
def test_generate_with_chosen_passes(
    folder: Path, answer: str, capsys: pytest.CaptureFixture[str], passes: str
) -> None:
    required = {kind.name for kind in PASSES if kind.required}
    arguments = ["generate", str(folder), "--prompt", PROMPT, *OPTIONS, "--passes", passes, "--report"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{answer}\n"
    first_words = {line.split()[0] for line in printed.err.splitlines() if line.strip()}
    assert first_words & set(_names()) == required | ({passes} & set(_names()))


def test_a_chat_template_is_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str) -> None:
    """The prompt goes through the template when the tokenizer has one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0].content }} w40"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["generate", str(tmp_path), "--prompt", PROMPT.removesuffix(" w40"), *OPTIONS]) == 0
    assert capsys.readouterr().out == f"{answer}\n"


def test_a_process_of_its_own_is_quiet(folder: Path, answer: str) -> None:
    """Without a terminal: the answer on stdout, and no progress, bars or escapes on stderr."""
    command = [sys.executable, "-m", "fxopt", "generate", str(folder), "--prompt", PROMPT, *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TQDM_DISABLE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{answer}\n"
    assert done.stderr == ""
