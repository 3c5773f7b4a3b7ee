"""docs/write-a-pass.md is run as it stands: its code, what it prints, its commands and its snippet."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest

from fxopt import registry

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "write-a-pass.md"
EXAMPLE = ROOT / "examples" / "write_a_pass.py"
PYTHON = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"\d\.\de[+-]\d\d|\d+ more of \d+")  # errors, which differ from one machine to the next


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that the page's code is run in."""
    monkeypatch.setattr(registry, "_registered", {})
    module = ModuleType("page_of_write_a_pass")
    module.__file__ = str(tmp_path / "test_page.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def run(code: str, module: ModuleType) -> str:
    """What a block prints."""
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(code, str(PAGE), "exec", annotations.compiler_flag), module.__dict__)
    return printed.getvalue()


@pytest.mark.pinned
@pytest.mark.filterwarnings("ignore:with wrong_norm applied")
def test_the_code_runs_and_prints_what_the_page_shows(
    page: ModuleType, update_golden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text()
    for code, shown in PYTHON.findall(text):
        printed = run(code, page)
        if update_golden and printed:
            text = text.replace(f"{code}```\n\n```text\n{shown}```", f"{code}```\n\n```text\n{printed}```")
            PAGE.write_text(text)
        else:
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown), "run `make golden` and look at the diff"
    page.test_rms_norm()
    with pytest.raises(AssertionError, match="no golden text"):
        page.test_rms_norm_text()
    monkeypatch.setenv("UPDATE_GOLDEN", "1")
    page.test_rms_norm_text()


def test_classes_are_those_of_the_example() -> None:
    classes = [code for code, _ in PYTHON.findall(PAGE.read_text()) if "class " in code]
    assert len(classes) == 3
    for code in classes:
        assert code in EXAMPLE.read_text()


def test_the_command_of_the_page() -> None:
    """One log line for each pass, and the pass that is switched off says so."""
    (command,) = re.findall(r"```sh\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    *settings, program, script = command.split()
    assert program == "python"
    environment = {**os.environ, **dict(setting.replace('"', "").split("=") for setting in settings)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rms_norm: dropped, switched off by TORCHINDUCTOR_DISABLED_PASSES" in done.stdout
    assert "static_kv matched 4 of 4" in done.stderr


def test_links_lead_somewhere() -> None:
    text = PAGE.read_text()
    headings = {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in headings if target.startswith("#") else (PAGE.parent / target).exists(), target


def test_the_entry_point_of_the_page() -> None:
    (snippet,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    head, entry = snippet.strip().splitlines()
    assert head == f'[project.entry-points."{registry.GROUP}"]'
    assert re.fullmatch(r'rms_norm = "[\w.]+:RMSNorm"', entry)
