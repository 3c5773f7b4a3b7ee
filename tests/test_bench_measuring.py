"""How ``fxopt bench`` measures: in turns, whatever happens to one of those who take part."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import MACHINE, TINY, Fake, FakeMeter, Taking, measuring, without_what_takes_long
from torch import Tensor
from transformers import AutoModelForCausalLM

from fxopt.bench.configs import CONFIGS, known_config, with_layers
from fxopt.bench.measuring import new_compilers
from fxopt.bench.memory import Resident, meter_for, tidy
from fxopt.bench.results import Results
from fxopt.bench.row import Row
from fxopt.bench.series import Series
from fxopt.bench.setting import Setting, settings
from fxopt.bench.source import Source
from fxopt.bench.stock import STOCK
from fxopt.bench.subject import Subject
from fxopt.bench.trouble import OUT_OF_MEMORY, noted
from fxopt.errors import InvalidRequestError, LoweringError
from fxopt.families import tiny

SMALL = settings([1], [6], [4])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_what_takes_long(monkeypatch)


def full(*_: object) -> None:
    """What PyTorch says when there is no memory."""
    torch.empty(2**60, dtype=torch.uint8)


# --- turns ---------------------------------------------------------------------------------------


def test_contenders_run_in_turns() -> None:
    calls: list[str] = []
    found = measuring([Fake("a", calls), Fake("b", calls)], rounds=3)
    found.run(Series(SMALL))
    assert calls == ["prepare b", "prepare a", "a", "a", "b", "b", *("a", "b") * 3]
    assert [(row.contender, len(row.runs)) for row in found.rows] == [("a", 3), ("b", 3)]
    assert [run.read_speed for row in found.rows for run in row.runs] == [2e10] * 6


def test_one_preparation_serves_settings_with_one_cache() -> None:
    calls: list[str] = []
    lengths = [*settings([1, 2], [6], [4]), *settings([1], [6], [4], 20)]
    found = measuring([Fake("a", calls)], rounds=1)
    found.run(Series(lengths))
    assert calls.count("prepare a") == 2
    assert [row.setting for row in found.rows] == lengths


def test_prompts_are_the_same_every_time() -> None:
    model, tokenizer = TINY.load()
    subject = Subject(TINY, model, tokenizer, 30, 2)
    long = subject.prompt(Setting(2, 20, 4, 30))
    assert long.shape == (2, 20)
    assert torch.equal(long, Subject(TINY, model, tokenizer, 30, 2).prompt(Setting(2, 20, 4, 30)))
    assert torch.equal(long[:1, :6], subject.prompt(Setting(1, 6, 4, 30)))
    assert not torch.equal(long[0], long[1])
    assert subject.texts(torch.tensor([[5, 6]]), [[7]]) == ["5 6 7"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_compilers_start_with_nothing(error: BaseException | None) -> None:
    """And leave nothing behind, also after Ctrl-C."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with contextlib.suppress(KeyboardInterrupt), new_compilers():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert folder.is_dir()
        assert str(folder) != before
        assert not list(folder.iterdir())
        if error is not None:
            raise error
    assert not folder.exists()
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


# --- trouble -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (ValueError("five is no number\nand more"), "ValueError: five is no number"),
        (InvalidRequestError("a batch of 9 was given"), "a batch of 9 was given"),
    ],
    ids=["CPU", "CUDA", "Python", "other", "ours"],
)
def test_an_error_is_a_row(error: Exception | None, said: str) -> None:
    """Of a larger batch; the smaller one and the other contender are measured."""

    def act(prompt: Tensor) -> None:
        if prompt.shape[0] > 1:
            if error is None:
                full()
            else:
                raise error

    calls: list[str] = []
    found = measuring([Fake("a", calls, act), Fake("b", calls)])
    found.run(Series(settings([1, 2], [6], [4])))
    rows = {(row.contender, row.setting.batch): row for row in found.rows}
    assert {key: row.trouble for key, row in rows.items() if row.trouble} == {("a", 2): said}
    assert [len(row.runs) for row in rows.values()] == [2, 2, 0, 2]


def test_what_cannot_be_prepared_is_not_tried_again() -> None:
    class Unprepared(Fake):
        def prepare(self, subject: Subject) -> None:
            super().prepare(subject)
            raise LoweringError("the compiler failed") from torch.OutOfMemoryError("no room")

    calls: list[str] = []
    found = measuring([Unprepared("a", calls)])
    found.run(Series(settings([1, 2], [6], [4])))
    assert calls == ["prepare a"]
    assert [row.trouble for row in found.rows] == [OUT_OF_MEMORY] * 2


def test_memory_of_what_failed_is_free_again() -> None:
    """The error held the frame, and the frame the tensor."""
    seen: list[Any] = []

    def fail() -> None:
        held = torch.ones(10)
        seen.append(weakref.ref(held))
        raise MemoryError

    row = Row("a", SMALL[0])
    with noted(row):
        fail()
    assert row.trouble == OUT_OF_MEMORY
    assert seen[0]() is None


def test_who_cannot_take_part_has_no_row() -> None:
    class Absent(Fake):
        def why_not(self, subject: Subject, setting: Setting) -> str | None:
            return "it is not installed" if setting.batch > 1 else None

    found = measuring([Absent("a", []), Fake("b", [])])
    found.run(Series(settings([1, 2], [6], [4])))
    assert [(row.contender, row.setting.batch) for row in found.rows] == [("a", 1), ("b", 1), ("b", 2)]
    assert found.left_out == {"a": "it is not installed"}


def test_rows_are_compared_within_their_setting() -> None:
    """With the stock model, and with the row above; the first row of a setting has none above."""
    found = measuring([Fake(STOCK, []), Fake("a", []), Fake("b", [], answer=8)])
    found.run(Series(settings([1, 2], [6], [4])))
    compared = Results.of(found, MACHINE).figures
    assert [one.to_stock is not None for one in compared] == [True] * 6
    assert [one.to_before is not None for one in compared] == 2 * [False, True, True]
    assert [one.agreed for one in compared] == 2 * [4, 4, 0]


# --- memory --------------------------------------------------------------------------------------


def test_peaks_are_those_of_contenders_alone() -> None:
    """What the others keep is not counted, nor what preparation took for a while; foreign weights are their own."""
    meter = FakeMeter()
    field = [
        Taking("a", meter, code=50_000, cache=700, run=90),
        Taking("b", meter, code=0, cache=20, run=3),
        Taking("c", meter, code=8_000_000, cache=0, run=5, shares=False),
    ]
    found = measuring(field)
    found.meter = meter
    found.run(Series(settings([1, 2], [6], [4])))
    weights = sum(one.nbytes for one in (*TINY.load()[0].parameters(), *TINY.load()[0].buffers()))
    assert [row.peak_bytes for row in found.rows] == 2 * [weights + 50_790, weights + 23, 8_000_005]


def test_without_a_meter_there_is_no_peak() -> None:
    found = measuring([Fake("a", [])])
    found.meter = None
    found.run(Series(SMALL))
    assert [row.peak_bytes for row in found.rows] == [None]
    assert len(found.rows[0].runs) == 2


@pytest.mark.skipif(meter_for(torch.device("cpu")) is None, reason="the system does not say how much memory is held")
def test_resident_memory_goes_up_and_down() -> None:
    meter, nbytes = Resident(), 2**26
    tidy()
    before = meter.now()
    held = torch.ones(nbytes, dtype=torch.uint8)
    assert meter.now() - before > 0.9 * nbytes
    del held
    tidy()
    assert meter.peak() - before > 0.9 * nbytes
    meter.restart()
    assert meter.peak() - before < 0.5 * nbytes


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_have_the_size_of_their_names(name: str) -> None:
    with torch.device("meta"):
        count = sum(one.numel() for one in AutoModelForCausalLM.from_config(known_config(name)).parameters())
    billions = {"llama-1b": 1.24, "llama-7b": 6.74, "llama-13b": 13.02, "llama-3.1-8b": 8.03, "smollm2-135m": 0.1345}
    assert count / 1e9 == pytest.approx(billions.get(name, 0.0001), rel=0.01 if name in billions else 0.9)


def test_random_weights_are_made_in_their_dtype_and_every_time_alike() -> None:
    source = Source("tiny", True, torch.bfloat16, torch.device("cpu"))
    before = torch.random.get_rng_state()
    one = source.load()[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    other = source.load()[0]
    assert {parameter.dtype for parameter in one.parameters()} == {torch.bfloat16}
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not one.training


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.bench.source.free_bytes", lambda device: 2**30)
    with pytest.raises(InvalidRequestError, match=r"weights of llama-7b in float16 take 12.6 GiB, and 1 GiB are free"):
        Source("llama-7b", True, torch.float16, torch.device("cpu")).load()


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(InvalidRequestError, match="there is no config 'llama-8b'; there are tiny, "):
        Source("llama-8b", True, torch.float32, torch.device("cpu")).load()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_another_depth(family: str) -> None:
    config = tiny(family).config
    model = AutoModelForCausalLM.from_config(with_layers(config, 5))
    kinds = getattr(model.config, "layer_types", None)
    assert model.config.num_hidden_layers == 5
    assert kinds is None or list(kinds) == [config.layer_types[layer % 2] for layer in range(5)]
    cache = model(torch.ones(1, 2, dtype=torch.long)).past_key_values
    assert len(cache.layers) == 5
    assert config.num_hidden_layers == 2, "the config that was given stays as it was"


def test_depths_are_measured_one_after_the_other() -> None:
    depths: list[int] = []

    class Depth(Fake):
        def prepare(self, subject: Subject) -> None:
            depths.append(subject.model.config.num_hidden_layers)

    found = measuring([Depth("a", [])], rounds=1)
    found.run(Series([Setting(1, 6, 4, 10, layers) for layers in (1, 3)]))
    assert depths == [1, 3]
    assert [one.setting.layers for one in Results.of(found, MACHINE).figures] == [1, 3]
