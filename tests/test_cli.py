"""The command line: what it prints where, and with which exit code."""

from __future__ import annotations

import argparse
import json
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
from fxopt.cli.options import add_passes, selection
from fxopt.families import tiny
from fxopt.passes import DEFAULT_PASSES, PASSES

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
        flag = kind.name.replace("_", "-")
        assert (f"--{'no-' if kind.by_default else ''}{flag}" in row) != kind.required


OFF = {"plan_memory", "offload_weights", "offload_kv", "quantize_kv", "quantize_weights"}  # by default


def _names() -> list[str]:
    return [kind.name for kind in PASSES]


def test_a_pass_that_is_off_by_default_has_a_flag_to_add_it() -> None:
    def chosen(*flags: str) -> set[str]:
        parser = argparse.ArgumentParser()
        add_passes(parser)
        return {one.name for one in selection(parser.parse_args(flags))}

    added = ("--plan-memory", "--offload-weights", "--offload-kv", "--quantize-kv", "--quantize-weights")
    assert set(_names()) - chosen() == OFF
    assert chosen(*added) == set(_names())
    assert chosen(*added, "--no-rotary") == set(_names()) - {"rotary"}
    assert "plan_memory" in chosen("--passes", "minimal", "--plan-memory")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "generate", "explain", "verify", "bisect", "passes"]),
        (["explain", "--help"], ["MODEL", "--diff", "--save-report", "--no-fuse-qkv"]),
        (["verify", "--help"], ["--prompts", "--batch-size", "exit code 1"]),
        (["bisect", "--help"], ["--prompt", "--output"]),
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
        (["--passes", "fuze_qkv"], ["no pass named 'fuze_qkv'", "did you mean fuse_qkv"]),
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

    monkeypatch.setattr("fxopt.request.capture", interrupted)
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
    assert set(_names()) - first_words == {"fuse_qkv", *OFF}


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


def test_explain(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a folder's config; as JSON; one pass as a diff; as a page."""
    page = tmp_path / "report.html"
    assert main(["explain", str(folder), "--max-len", "64", "--save-report", str(page)]) == 0
    printed = capsys.readouterr()
    assert "One decode step, batch 1, 32 rows of the cache filled" in printed.out
    assert all(kind.name in printed.out for kind in DEFAULT_PASSES)
    assert page.read_text().startswith("<!doctype html>")
    assert main(["explain", str(folder), "--max-len", "64", "--json", "--batch", "4", "--no-rotary"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["batch"], data["model"]) == (2, 4, "LlamaForCausalLM")
    assert "rotary" not in {stage["name"] for stage in data["stages"]}
    assert main(["explain", str(folder), "--max-len", "64", "--diff", "static_kv"]) == 0
    diff = capsys.readouterr().out
    assert "- cat" in diff
    assert "+ index_copy__default = index_copy_(key_0, 2, cache_position, " in diff


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--diff", "fuze_qkv"], ["no pass named 'fuze_qkv'", "did you mean fuse_qkv?"]),
        (["--save-report", "report.pdf"], ["'.pdf'", ".html, .json, .txt"]),
        (["--max-len", "1000"], ["max_len=1000", "256 positions"]),
    ],
    ids=" ".join,
)
def test_explanations_that_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(["explain", str(folder), "--max-len", "64", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxopt: ")
    assert all(word in error for word in words), error


def test_verify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w5 w17 w40\n\nw9 w8\n")
    arguments = ["verify", str(folder), "--prompts", str(prompts), "--prompt", "w20", *OPTIONS, "--verify", "each"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "w20" in printed.out
    assert "w9 w8" in printed.out
    assert "the same tokens" in printed.out
    assert main([*arguments, "--json", "--batch-size", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_verify_and_bisect_tell_a_difference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 for other tokens, the pass that makes them, and a script that shows it."""
    from fxopt.passes.rotary import Rotary, Rotation

    rewrite = Rotary.rewrite

    def wrong(self: Rotary, program: Any, site: Rotation) -> None:
        with program.graph.inserting_before(site.node):
            negative = program.graph.call_function(torch.ops.aten.neg.default, (site.sin,))
        rewrite(self, program, Rotation(site.node, site.x, negative, site.half))

    monkeypatch.setattr(Rotary, "rewrite", wrong)
    options = ["--prompt", "w5 w17 w40 w7 w8", *OPTIONS]
    assert main(["verify", str(folder), *options, "--verify", "off"]) == 1
    assert "DIFFERENT TOKENS" in capsys.readouterr().out
    script = tmp_path / "fault.py"
    assert main(["bisect", str(folder), *options, "--output", str(script)]) == 1
    printed = capsys.readouterr().out
    assert "  rotary" in printed
    assert "fxopt.optimize(model, MAX_LEN" in script.read_text()
    monkeypatch.setattr(Rotary, "rewrite", rewrite)
    assert main(["bisect", str(folder), *options]) == 0
    assert "nothing to find" in capsys.readouterr().out


def test_no_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), *OPTIONS]) == 2
    assert_one_sentence(capsys, "there is no prompt", "--prompts FILE")
