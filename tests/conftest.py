"""Fixtures that tests of several files share; what is expensive is made once in each process."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import optimised
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from untouched import MAX_LEN, OWN_ATTENTION, State

from fxopt import dynamo_backend
from fxopt.capture import capture
from fxopt.families import tiny
from fxopt.program import Program


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts and the documents")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    torch.set_num_threads(1)  # tests run side by side, and tiny ops wait for threads longer than they compute


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("pinned") and (others := _other_versions()):
        pytest.skip(f"it compares what the versions in constraints.txt make, and here there is {others}")


@pytest.fixture(scope="session")
def other_versions() -> str:
    """What is installed here and is not what constraints.txt names; "" where there is nothing to say."""
    return _other_versions()


@functools.cache
def _other_versions() -> str:
    """What graphs are made by, where it is not what constraints.txt names."""
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines if "==" in line)
    found = {name: metadata.version(name) for name in ("torch", "transformers")}
    return ", ".join(f"{name} {has}" for name, has in found.items() if _release(has) != _release(wanted[name]))


def _release(version: str) -> list[str]:
    """Without what only mends: graphs stay the same."""
    return version.split(".")[:2]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be started for a request that is refused."""
    monkeypatch.setattr("fxopt.request.capture", lambda *_, **__: pytest.fail("the capture was reached"))
    monkeypatch.setattr("fxopt.api.Progress", lambda *_: pytest.fail("work was begun"))


# --- a stock model that nothing may change -------------------------------------------------------


@pytest.fixture(scope="session")
def stock_llama() -> Any:
    """One model for all tests: each leaves it as it was, or the next one fails."""
    AttentionInterface.register(OWN_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(OWN_ATTENTION, sdpa_mask)
    model = tiny("llama", num_hidden_layers=1)
    model.set_attn_implementation(OWN_ATTENTION)
    return model


@pytest.fixture(scope="session")
def stock_state(stock_llama: Any) -> State:
    return State.of(stock_llama)


@pytest.fixture(scope="session")
def stock_captured(stock_llama: Any) -> Program:
    return capture(stock_llama, max_len=MAX_LEN, capacity=64)


@pytest.fixture
def captured_once(stock_captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not capture again for failures that come later."""
    monkeypatch.setattr("fxopt.request.capture", lambda model, **sizes: stock_captured.copy())


@pytest.fixture
def no_other_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fxopt goes on.*")
        yield


# --- saved models --------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a key of their own."""
    monkeypatch.setenv("FXOPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, saved; tests work on copies."""
    place = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXOPT_HOME", str(place / "home"))
        optimised(tiny("llama")).fxopt.save(place / "saved")
    return place


@pytest.fixture
def saved(written: Path, tmp_path: Path, home: Path) -> Path:
    shutil.copytree(written / "home", home)
    shutil.copytree(written / "saved", tmp_path / "saved")
    return tmp_path / "saved"


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    dynamo_backend._reports.clear()
    yield
    torch._dynamo.reset()
