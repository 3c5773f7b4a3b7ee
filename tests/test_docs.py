"""The documents say what the code does: generated graph text, links, the catalogue of passes."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest

from fxopt.capture import capture
from fxopt.distance import FACTOR, FLOOR
from fxopt.driver import apply
from fxopt.families import tiny
from fxopt.judge import SMALL_CHUNK
from fxopt.listing import readable
from fxopt.passes import DEFAULT_PASSES, PASSES
from fxopt.program import Program
from fxopt.rewrite import Stage
from fxopt.scenarios import DECODE_STEPS, LATER_PROMPT, MOST_CACHE_BYTES, PROMPT
from fxopt.specialise import Role, specialise

ROOT = Path(__file__).parent.parent
WALK = ROOT / "docs" / "how-it-works.md"
BLOCK = re.compile(r"(<!-- graph: (\w+) -->\n```text\n)(.*?)(```)", re.DOTALL)
FIRST_LAYER = (None, 0)  # what belongs to no layer, and layer 0


def blocks() -> dict[str, str]:
    """What each generated block should hold."""
    program = capture(tiny("llama"), max_len=100, capacity=128, backend="inductor")
    texts = {"capture": _attention_of(readable(program, layers=[0]))}
    for kind in PASSES:
        if kind.stage is not Stage.SYMBOLIC:
            continue
        after, _ = apply(kind(), program)
        texts[kind.name] = _changes(program, after)
        program = after if kind.by_default else program
    program = specialise(program, Role("decode", 1, longest_step=1))
    for kind in PASSES:
        if kind.stage is Stage.DECODE:
            before = program
            program, _ = apply(kind(), program)
            texts[kind.name] = _changes(before, program)
    return texts


def _attention_of(text: str) -> str:
    """From the first projection to the output projection, without assertions."""
    lines = [line for line in text.splitlines() if "_assert" not in line]
    first = next(i for i, line in enumerate(lines) if "q_proj" in line)
    last = next(i for i, line in enumerate(lines) if "o_proj" in line)
    return "\n".join(lines[first : last + 1]) + "\n"


def _changes(before: Program, after: Program) -> str:
    old, new = (readable(p, layers=FIRST_LAYER).splitlines() for p in (before, after))
    lines = difflib.unified_diff(old, new, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@"))) + "\n"


@pytest.mark.pinned
def test_graph_texts_are_what_the_passes_write(update_golden: bool) -> None:
    wanted = blocks()
    text = WALK.read_text()
    named = [name for _, name, _, _ in BLOCK.findall(text)]
    assert named == list(wanted), "every pass has its block, in pipeline order"
    if update_golden:
        text = BLOCK.sub(lambda m: m.group(1) + wanted[m.group(2)] + m.group(4), text)
        WALK.write_text(text)
    for _, name, found, _ in BLOCK.findall(text):
        assert found == wanted[name], f"{name} has changed; run `make golden` and look at the diff"


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_readme_lists_every_pass() -> None:
    readme = (ROOT / "README.md").read_text()
    for kind in PASSES:
        assert f"[`{kind.name}`](passes/{kind.name}.py)" in readme, kind.name


def test_a_pass_is_named_as_its_file() -> None:
    for kind in PASSES:
        assert kind.__module__ == f"fxopt.passes.{kind.name}"
        assert (ROOT / "passes" / f"{kind.name}.py").exists()


def test_readme_shows_a_report_of_every_pass() -> None:
    sample = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert sample is not None
    assert all(kind.name in sample.group(1) for kind in DEFAULT_PASSES)


def test_the_limits_are_documented() -> None:
    """What the page says of the judge is what the judge does."""
    page = " ".join((ROOT / "docs" / "see-and-trust.md").read_text().split())
    assert FACTOR == 4.0
    assert FLOOR == 2.0
    assert "**4 times the noise**" in page
    assert "never has to be nearer than 2 roundings" in page
    assert f"a prompt of {PROMPT} tokens" in page
    assert f"then {DECODE_STEPS} single tokens" in page
    assert f"fed by {SMALL_CHUNK}" in page
    assert f"the last {DECODE_STEPS + LATER_PROMPT} tokens before" in page
    assert f"more than {MOST_CACHE_BYTES // 2**30} GiB" in page


def test_every_package_is_shipped() -> None:
    """A folder of code that pyproject does not name is missing from wheels, and only from those."""
    listed = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None
    folders = {"fxopt", *(f"fxopt.{path.parent.name}" for path in (ROOT / "fxopt").glob("*/__init__.py"))}
    assert set(re.findall(r'"([\w.]+)"', listed.group(1))) == folders


def test_no_page_was_left_half_written() -> None:
    for page in (*WALK.parent.glob("*.md"), WALK.parent.parent / "README.md"):
        assert not re.search(r"@@[A-Z]+@@|TODO|FIXME", page.read_text()), page.name
