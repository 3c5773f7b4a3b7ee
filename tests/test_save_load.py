"""What is saved is what is loaded, under the options, versions and passes that it was saved with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from saved_models import optimised, tokens_of
from transformers import PreTrainedModel
from words import word_tokenizer

import fxopt
from fxopt import ArtifactError, InvalidRequestError
from fxopt.artifact import keys
from fxopt.cli import main
from fxopt.families import tiny
from fxopt.listing import listing
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.program import Program
from fxopt.views import Miss

pytestmark = pytest.mark.usefixtures("home")


#: Grouped heads, soft caps and windows; experts; joined projections; no rotary; constants of their own.
FAMILIES = ("llama", "gemma2", "mixtral", "gpt2", "bloom", "falcon", "gpt_neo")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_the_saved_one(family: str, tmp_path: Path) -> None:
    fast = optimised(tiny(family))
    fast.fxopt.save(tmp_path / "saved")
    model = tiny(family)
    loaded = fxopt.load(tmp_path / "saved", model)

    assert torch.equal(tokens_of(loaded), tokens_of(fast))
    assert torch.equal(tokens_of(loaded, batch=3), tokens_of(model, batch=3))  # a graph that was not saved
    stats = loaded.fxopt.stats
    assert stats["loaded prefill for 1 sequence"] == stats["loaded decode for 1 sequence"] == 1
    assert stats["compiled decode for two sequences or more"] == 1
    assert "compiled decode for 1 sequence" not in stats
    for name in fast.fxopt.graphs:
        before, after = (_lines(one.fxopt.graphs[name], one.fxopt.symbolic) for one in (fast, loaded))
        assert before == after


def _lines(gm: Any, like: Program) -> list[str]:
    return [line.text for line in listing(Program(gm, like.facts, like.fake_mode))]


def test_the_report_is_loaded_with_its_graphs(saved: Path) -> None:
    before, after = optimised(tiny("llama")).fxopt.report, fxopt.load(saved, tiny("llama")).fxopt.report
    assert [stage.name for stage in after.stages] == [stage.name for stage in before.stages]
    assert [stage.step for stage in after.stages] == [stage.step for stage in before.stages]
    assert after.diff("fuse_qkv") == before.diff("fuse_qkv")
    assert type(after) is type(before)


def test_aot_eager_with_layers_and_two_batches(tmp_path: Path) -> None:
    model = tiny("llama", layers=4)
    fast = optimised(model, backend="aot_eager", max_batch=3, compile="layer", verify="final")
    fast.fxopt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved", tiny("llama", layers=4))
    for batch in (1, 3):
        assert torch.equal(tokens_of(loaded, batch), tokens_of(model, batch))
    assert not [event for event in loaded.fxopt.stats if event.startswith("compiled")]
    assert loaded.fxopt.report.to_dict() == fast.fxopt.report.to_dict()


def test_what_was_loaded_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = fxopt.load(saved, tiny("llama"))
    loaded.fxopt.save(tmp_path / "again")
    again = fxopt.load(tmp_path / "again", tiny("llama"))
    assert torch.equal(tokens_of(again), tokens_of(tiny("llama")))


def test_weights_come_from_the_model_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    optimised(tiny("llama", tie_word_embeddings=True)).fxopt.save(tmp_path / "saved")
    model = tiny("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    loaded = fxopt.load(tmp_path / "saved", model)
    assert torch.equal(tokens_of(loaded), tokens_of(model))
    with pytest.raises(ArtifactError, match=r"config.tie_word_embeddings differs: True when it was saved, False here"):
        fxopt.load(tmp_path / "saved", tiny("llama"))


def test_passes_that_were_left_out_stay_out(tmp_path: Path) -> None:
    optimised(tiny("llama"), passes={"fuse_qkv": False, "window_kv": False}).fxopt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved", tiny("llama"))
    assert torch.equal(tokens_of(loaded), tokens_of(tiny("llama")))
    assert "fuse_qkv" not in [one.name for one in loaded.fxopt.report.stages]


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"max_len": 128}, "max_len differs: 64 when it was saved, 128 here"),
        ({"backend": "inductor"}, "backend differs"),
        ({"chunk": 16}, "chunk differs"),
        ({"max_batch": 2}, "max_batch differs: None when it was saved, 2 here"),
        (
            {"passes": {"rotary": False}},
            r"passes\.rotary differs: .* nothing here; load what was saved with these options",
        ),
    ],
)
def test_other_options_than_expected(saved: Path, expected: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        fxopt.load(saved, tiny("llama"), expected=expected)


def test_expected_options_that_fit(saved: Path) -> None:
    fxopt.load(saved, tiny("llama"), expected={"max_len": 64, "backend": "eager", "passes": None})
    with pytest.raises(InvalidRequestError, match="expected names 'max_length'"):
        fxopt.load(saved, tiny("llama"), expected={"max_length": 64})
    with pytest.raises(InvalidRequestError, match="is no mapping; give options by name"):
        fxopt.load(saved, tiny("llama"), expected=["max_len"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="folder=5 is no path"):
        fxopt.load(5, tiny("llama"))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="code='mine' is not one of signed, trusted, again"):
        fxopt.load(saved, tiny("llama"), code="mine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: tiny("mistral"), "model class differs"),
        (lambda: tiny("llama", layers=4), "config.num_hidden_layers differs: 2 when it was saved, 4 here"),
        (lambda: tiny("llama", rms_norm_eps=1e-3), "config.rms_norm_eps differs"),
        (lambda: tiny("llama", torch.float64), r"weights.\S+ differs: 'float32 \[128, 64\]' when it was saved"),
        (lambda: _with_longer_vocabulary(), r"weights.lm_head.weight differs"),
        (lambda: torch.nn.Linear(2, 2), "a Linear was given"),
    ],
)
def test_another_model(saved: Path, model: Callable[[], Any], complaint: str) -> None:
    with pytest.raises((ArtifactError, InvalidRequestError), match=complaint):
        fxopt.load(saved, model())


def _with_longer_vocabulary() -> PreTrainedModel:
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(130, 64))
    return model


@pytest.mark.parametrize("owner", ["torch", "transformers", "fxopt"])
def test_other_versions(saved: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    # Transformers runs its __init__ again when its processors are imported: there may be two modules of that name.
    module = fxopt if owner == "fxopt" else getattr(keys, owner)
    monkeypatch.setattr(module, "__version__", "0.0.1")
    with pytest.raises(ArtifactError, match=f"{owner} differs"):
        fxopt.load(saved, tiny("llama"))


@dataclass(frozen=True)
class Mine(FuseQKV):
    name: ClassVar[str] = "mine"
    after: ClassVar[str | None] = "fuse_qkv"
    strength: int = 1

    def find(self, program: Program) -> Iterator[Any | Miss]:
        return iter(())


def test_a_pass_that_is_not_installed_where_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"the pass mine \(\S+Mine\) is not in the catalogue"):
        optimised(tiny("llama"), passes=["fuse_qkv", Mine()]).fxopt.save(tmp_path / "saved")
    fxopt.register(Mine)
    try:
        optimised(tiny("llama"), passes={"mine": Mine(strength=2)}).fxopt.save(tmp_path / "saved")
        assert fxopt.load(tmp_path / "saved", tiny("llama"), expected={"passes": {"mine": {"strength": 2}}})
        with pytest.raises(ArtifactError, match=r"passes.mine.options.strength differs: 2 when it was saved, 1 here"):
            fxopt.load(tmp_path / "saved", tiny("llama"), expected={"passes": None})
    finally:
        fxopt.unregister("mine")
    with pytest.raises(ArtifactError, match=r"saved with the pass mine .* there is none of this name here"):
        fxopt.load(tmp_path / "saved", tiny("llama"))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (tiny("llama"), word_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "--prompt", "w5 w6 w7", "--max-new-tokens", "4"]
    command += ["--max-len", "64", "--backend", "eager"]
    folder = str(tmp_path / "saved")
    answers = []
    for more in (["--save", folder], ["--load", folder]):
        assert main([*command, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    assert main([*command, "--load", folder, "--no-rotary"]) == 2
    assert "passes" in capsys.readouterr().err
