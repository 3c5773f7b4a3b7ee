"""``fxopt bench`` from its flags to its files, with tiny models and no compiler."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from bench_fakes import MACHINE, TINY, without_what_takes_long
from words import word_tokenizer

from fxopt.bench import growth, machine
from fxopt.bench.lineup import CONTENDERS, Ways, ablation
from fxopt.bench.machine import Machine
from fxopt.bench.ours import Ours
from fxopt.bench.setting import Setting
from fxopt.bench.stock import DynamicCompiled, StaticCompiled, generated
from fxopt.bench.subject import Subject
from fxopt.cli import main
from fxopt.cli.bench import source_of
from fxopt.families import tiny
from fxopt.passes import PASSES
from fxopt.rewrite import Pass

SMALL = ["--config", "tiny", "--backend", "eager", "--rounds", "1", "--prompt", "9", "--new", "4"]
TORCH = ["--contenders", "stock", "dynamic", "static", "fxopt"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what takes longer than a tiny model; the test of traces does everything."""
    if request.function is not test_traces:
        without_what_takes_long(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everybody says the same in every setting, and other settings have other hashes."""
    table, picture = tmp_path / "bench.csv", tmp_path / "bench.svg"
    arguments = [*SMALL, *TORCH, "--batch", "1", "2", "--compile", "layer", "whole", "--csv", str(table)]
    assert main(["bench", *arguments, "--svg", str(picture), "--threads", "1"]) == 0
    printed = capsys.readouterr()
    names = [
        "stock eager",
        "DynamicCache + torch.compile",
        "StaticCache + torch.compile",
        "fxopt, layer",
        "fxopt, whole",
    ]
    rows = lines(table)
    assert [row["contender"] for row in rows] == 2 * names
    assert {row["same_tokens"] for row in rows} == {"4"}
    hashes = [row["hash"] for row in rows]
    assert len(set(hashes[:5])) == len(set(hashes[5:])) == 1
    assert hashes[0] != hashes[5]
    assert all(float(row["tok_per_s"]) > 0 and float(row["to_stock"]) > 0 for row in rows)
    assert {row["max_len"] for row in rows} == {"13"}
    assert printed.out.count("yes") == 10
    root = ElementTree.parse(picture).getroot()
    assert len(list(root.iter(f"{SVG}polyline"))) >= 15, (
        "three panels with five lines each, and memory where it is said"
    )


def test_passes_that_are_added_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "bench.csv"
    assert main(["bench", *SMALL, "--ablate", "--passes", "fuse_qkv,window_kv", "--csv", str(table)]) == 0
    rows = lines(table)
    added = ["stock eager", "remove_control_flow + static_kv", "+ window_kv", "+ fuse_qkv"]
    assert [row["contender"] for row in rows] == added
    assert {row["trouble"] for row in rows} == {""}, "weights that one of them seats anew are found by the others"
    assert len({row["hash"] for row in rows}) == 1
    assert "to above" in capsys.readouterr().out


def test_an_ablation_adds_passes_in_their_order() -> None:
    chosen: list[Pass[Any]] = [kind() for kind in PASSES]
    stock, *ours = (getattr(one, "passes", None) for one in ablation(Ways(chosen)))
    assert stock is None
    needed = {one.name for one in chosen if one.required}
    assert {one.name for one in ours[0] or ()} == needed
    for before, after in itertools.pairwise(ours):
        assert len(after or ()) == len(before or ()) + 1
        assert [one for one in after or () if one in (before or ())] == list(before or ())
    assert ours[-1] == chosen


def test_growth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "DEPTHS", (1, 3))
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    table, picture = tmp_path / "growth.csv", tmp_path / "growth.svg"
    arguments = ["--config", "tiny", "--backend", "eager", "--rounds", "1", "--contenders", "stock", "fxopt"]
    assert main(["bench", *arguments, "--growth", "depth", "batch", "--svg", str(picture), "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    assert "Deeper models: until the first answer\n" in out
    assert "More sequences, 64 tokens each\n" in out
    told = [line.split() for line in out.splitlines() if line.startswith("fxopt ")]
    assert [line[1] for line in told] == ["1", "3", "1", "2"]
    assert [line[-1].endswith("x") for line in told] == [True] * 4
    assert out.count("all sizes ran in turns") == 2
    rows = lines(table)
    assert [(row["axis"], row["layers"], row["batch"]) for row in rows if row["contender"] == "fxopt"] == [
        ("depth", "1", "1"),
        ("depth", "3", "1"),
        ("batch", "", "1"),
        ("batch", "", "2"),
    ]
    assert {row["same_tokens"] for row in rows} == {"2", "16"}
    assert [row["step_to_first"] for row in rows][:2] == ["1.0", "1.0"]
    titles = ["".join(text.itertext()) for text in ElementTree.parse(picture).getroot().iter(f"{SVG}text")]
    assert {"Deeper models: until the first answer", "layers", "sequences"} <= set(titles)
    assert not {"Fuller caches, max_len 1024"} & set(titles)


def test_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What TensorBoard reads, of the decode step that ran."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *SMALL, "--contenders", "stock", "fxopt", "--profile"]) == 0
    assert "tensorboard --logdir tb_logs" in capsys.readouterr().err
    for name in ("stock_eager", "fxopt"):
        (trace,) = (tmp_path / "tb_logs" / name).glob("batch1_prompt9_max13.*.pt.trace.json")
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert "aten::scaled_dot_product_attention" in names


def test_a_folder_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (tiny("gpt2"), word_tokenizer()):
        part.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), *SMALL[2:], "--dtype", "bfloat16", "--contenders", "stock", "fxopt"]
    assert main(["bench", *arguments]) == 0
    assert f"{tmp_path}, bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--growth", "--batch", "2"], ["--growth chooses its sizes itself", "leave --batch out"]),
        (["--growth", "--max-len", "20"], ["leave --max-len out"]),
        (["--ablate", "--contenders", "stock"], ["leave --contenders out"]),
        (["--ablate", "--compile", "layer", "whole"], ["give one --compile"]),
        (["--ablate", "--growth"], ["not allowed with"]),
        (["--config", "tiny", "--model", "demo"], ["not allowed with"]),
        (["--config", "llama-8b"], ["llama-8b", "llama-7b"]),
        (["--batch", "0"], ["give at least 1"]),
        (["--contenders", "nobody"], ["nobody", "llama.cpp"]),
    ],
    ids=" ".join,
)
def test_flags_that_mean_nothing(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *flags])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-len", "10"], "make 13, but max_len is 10"),
        (["--svg", "one.svg"], "one setting makes no picture"),
        (["--new", "1"], "ask for 2 or more"),
        (["--passes", "fuze_qkv"], "did you mean fuse_qkv"),
    ],
)
def test_requests_that_are_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fxopt: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_a_pass_that_changes_tokens_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row says from where on, and the exit code that something is wrong."""
    right = Ours.generate

    def wrong(self: Ours, *arguments: Any) -> list[list[int]]:
        tokens = right(self, *arguments)
        if "rotary" in self.name:
            tokens[0][2] += 1
        return tokens

    monkeypatch.setattr(Ours, "generate", wrong)
    assert main(["bench", *SMALL, "--ablate", "--passes", "rotary"]) == 1
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if line.startswith("+ rotary"))
    assert line.endswith("first 2")
    assert printed.err.count("its tokens are those of the stock model for the first 2 alone") == 1


# --- defaults ------------------------------------------------------------------------------------


class Arguments:
    """What the parser makes of no flags."""

    model = config = device = None
    dtype = "float32"


@pytest.mark.parametrize(("installed", "name"), [(True, "demo"), (False, "smollm2-135m (random weights)")])
def test_the_model_that_is_taken(installed: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.cli.bench.is_demo_installed", lambda: installed)
    assert str(source_of(Arguments())) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_taken_if_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert source_of(Arguments()).device.type == ("cuda" if there else "cpu")  # type: ignore[arg-type]


def test_help_names_everybody(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in (*CONTENDERS, *growth.NAMES, "llama-3.1-8b", "--ablate", "--no-fuse-qkv"))


# --- where and with what -------------------------------------------------------------------------


def test_this_machine() -> None:
    found = Machine.here(torch.device("cpu"))
    assert found.versions["torch"] == torch.__version__
    assert found.cores >= 1
    assert len(found.date) == len(MACHINE.date)
    assert found.device


def test_the_commit_is_that_of_fxopt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plus says that files were changed; a checkout that fxopt was installed into is somebody else's."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True).stdout.strip()

    file = tmp_path / "machine.py"
    monkeypatch.setattr(machine, "__file__", str(file))
    assert machine._commit() == ""
    git("init")
    (tmp_path / "other.py").write_text("1")
    git("add", "other.py")
    git("commit", "-m", "one")
    file.write_text("1")
    assert machine._commit() == ""
    git("add", "machine.py")
    git("commit", "-m", "two")
    assert machine._commit() == git("rev-parse", "--short", "HEAD") != ""
    file.write_text("2")
    assert machine._commit() == git("rev-parse", "--short", "HEAD") + "+"


# --- contenders ----------------------------------------------------------------------------------


def test_a_static_cache_is_kept_between_runs() -> None:
    """Graphs that a GPU has recorded are bound to its addresses; another batch has another one."""
    model, tokenizer = TINY.load()
    subject = Subject(TINY, model, tokenizer, 20, 2)
    one = StaticCompiled("eager")
    one.prepare(subject)
    prompt = subject.prompt(Setting(2, 9, 4, 20))
    tokens = one.generate(prompt, 4, None)
    kept = one._caches[2]
    assert one.generate(prompt, 4, None) == tokens == generated(model, prompt, 4, None)
    assert one._caches == {2: kept}
    assert one.generate(prompt[:1], 4, None) == tokens[:1]
    assert set(one._caches) == {1, 2}, "settings may take turns"
    one.release()
    assert not one._caches


def test_the_stock_model_stays_as_it_was() -> None:
    model, tokenizer = TINY.load()
    before = dict(model.__dict__)
    subject = Subject(TINY, model, tokenizer, 20, 1)
    for one in (StaticCompiled("eager"), DynamicCompiled("eager")):
        one.prepare(subject)
        one.generate(subject.prompt(Setting(1, 9, 4, 20)), 4, None)
    assert model.__dict__ == before
