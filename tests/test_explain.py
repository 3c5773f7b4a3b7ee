"""``fxopt.explain``: the report of what would be done, without weights."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxopt
from fxopt.families import FAMILIES, tiny

LLAMA_70B = Path(__file__).parent / "data" / "llama-3.1-70b" / "config.json"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "falcon"])
def test_it_says_what_optimize_does(family: str) -> None:
    """The same rows as the report of the real thing, but for what only running can tell."""
    model = tiny(family)
    real = fxopt.optimize(model, 64, backend="eager", verify="off").fxopt.report
    said = fxopt.explain(model.config, 64, dtype=torch.float32, backend="eager")
    for wanted, found in zip(real.stages, said.stages, strict=True):
        assert (found.name, found.expected, found.matched) == (wanted.name, wanted.expected, wanted.matched)
        assert (found.nodes_before, found.nodes_after, found.ops) == (
            wanted.nodes_before,
            wanted.nodes_after,
            wanted.ops,
        )
        assert found.step == wanted.step, found.name
        assert [line.text for line in found.listing] == [line.text for line in wanted.listing]
    assert not said.checks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_explained(family: str) -> None:
    report = fxopt.explain(tiny(family).config, 64)
    assert all(stage.is_complete for stage in report.passes)


def test_from_a_folder_and_a_file(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    folder, file = fxopt.explain(tmp_path, 64), fxopt.explain(str(tmp_path / "config.json"), 64)
    assert str(folder).splitlines()[0] == str(file).splitlines()[0] == "LlamaForCausalLM, max_len 64, backend inductor"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no config can be read"),
        ("{", "no config can be read"),
        ('{"model_type": "vit"}', "is of no causal LM"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}', "no config can be read"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('code of a folder was run')")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(fxopt.InvalidRequestError, match=words):
        fxopt.explain(tmp_path, 64)


def test_a_model_without_weights_cannot_be_optimised() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = tiny("llama")
    with pytest.raises(fxopt.InvalidRequestError, match="have no values"):
        fxopt.optimize(fake, 64)


@pytest.mark.slow
def test_llama_70b_on_a_laptop() -> None:
    """All 80 layers in less than a minute and 4 GB."""
    code = (
        "import resource, sys\n"
        "from fxopt.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "raise SystemExit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", str(LLAMA_70B), "--json"], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["stages"]}
    assert (rows["static_kv"]["matched"], rows["fuse_qkv"]["matched"]) == (160, 80)
    weights = 2 * (70_553_706_496 - 128256 * 8192)  # bfloat16; of the embedding one row is read
    assert rows["matvec"]["step"]["weight_bytes"] == pytest.approx(weights, rel=0.01)
    assert int(done.stderr.split()[-1]) < 4 * 2**20
    # Of one core, so that other work on the machine is not counted.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
