"""What ``fxopt bench`` shows and writes: tables, and lines of a CSV file."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_fakes import MACHINE, figure, results

from fxopt.bench import records
from fxopt.bench.growth import axes
from fxopt.bench.table import ABLATION, COLUMNS, compared, grown
from fxopt.errors import InvalidRequestError

# --- tables --------------------------------------------------------------------------------------


def test_a_table_says_what_was_measured() -> None:
    fast = figure(
        prefill_ms=1234.4, token_ms=13.5, decode_to_stock=4.18, tok_s=73.8, to_stock=3.5, peak_mb=704.2, read_gb_s=19.8,
        of_read_speed=1.03, text_hash="00000e12", agreed=8,
    )  # fmt: skip
    text = compared(results(fast, figure("broken", trouble="out of memory")))
    line = next(line for line in text.splitlines() if line.startswith("fxopt"))
    shown = ["fxopt", "1", "1,234", "13.5", "4.18x", "73.8", "3.50x", "704", "19.8", "103%", "00000e12", "yes"]
    assert line.split() == shown
    assert "broken, batch 1, prompt 20, 8 new tokens, max_len 28: out of memory" in text
    assert "some processor, 1 threads of 2 cores; torch 2.13.0" in text
    assert "(abc1234); 2026-11-21" in text
    assert "limit: a plain read of memory in the same round" in text
    assert "20.0 GB/s" in text
    assert "to above" not in text
    assert max(map(len, text.splitlines())) <= 130


def test_columns_stand_below_their_headers() -> None:
    text = compared(results(figure(token_ms=13.5, tok_s=73.8)))
    upper, lower, _, line = _table(text)
    for name, value in (("ms/token", "13.5"), ("tokens/s", "73.8")):
        assert lower.index(name) + len(name) == line.index(value) + len(value)
    assert upper.index("decode") + len("decode") == lower.index("ms/token") + len("ms/token")


def _table(text: str) -> tuple[str, str, str, str]:
    lines = text.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("contender"))
    return lines[place - 1], lines[place], lines[place + 1], lines[place + 2]


def test_tokens_that_part_are_shown() -> None:
    assert COLUMNS["same\ntokens"](figure(agreed=3)) == "first 3"
    assert COLUMNS["same\ntokens"](figure()) == ""


def test_an_ablation_compares_with_the_row_above() -> None:
    one = figure("+ rotary", decode_to_before=1.25, to_before=1.5)
    text = compared(results(one), ABLATION)
    assert "1.25x" in text
    assert "1.50x" in text
    assert "to above" in _table(text)[1]
    assert "to above: the same, to the row above." in text
    assert "GB/s" not in text, "what is not in the table is not explained"


def test_what_nobody_measured_has_no_column() -> None:
    one = figure(token_ms=13.5, peak_mb=700)
    text = compared(results(one, dataclasses.replace(one, peak_mb=None)))
    assert _table(text)[1].split() == ["contender", "s", "ms/token", "MB"]
    assert "peak: resident memory of the process, if" in text
    assert not {"limit:", "hash:", "stock:"} & set(text.split())
    assert "peak" not in compared(results(dataclasses.replace(one, peak_mb=None)))


def test_growth_is_told_beside_the_time() -> None:
    """Contender by contender; what another axis has measured is not in the table."""
    lengths, _, depths, _ = axes(4096)
    found = [
        figure(name, one, axis="max-len", token_ms=1.5 * step, step_to_first=1.25 * step)
        for step, one in enumerate(lengths.settings, start=1)
        for name in ("stock", "fxopt")
    ]
    found[3] = dataclasses.replace(found[3], token_ms=None, step_to_first=None, trouble="it broke")
    found.append(figure("other", lengths.settings[0], axis="batch"))
    text = grown(results(*found), [lengths])
    lines = [line.split() for line in text.splitlines()]
    assert [line for line in lines if line[:1] == ["stock"]] == [
        ["stock", "256", "1.5", "1.25x"],
        ["stock", "1,024", "3.0", "2.50x"],
        ["stock", "4,096", "4.5", "3.75x"],
    ]
    assert ["fxopt", "1,024"] in lines
    assert ["contender", "max_len", "ms/token", "long", "as", "with", "256"] in lines
    assert "fxopt, batch 1, prompt 64, 16 new tokens, max_len 1024: it broke" in text
    assert "the median of the rounds; all sizes ran in turns in each round." in text
    assert "other" not in text
    assert "ready" not in text, "what is prepared may serve several sizes"
    deep = figure("fxopt", depths.settings[1], axis="depth", token_ms=2.0, step_to_first=1.75, ready_to_first=1.1)
    text = grown(results(deep), [depths])
    assert next(line.split() for line in text.splitlines() if line.startswith("fxopt")) == [
        "fxopt", "8", "1.0", "1.10x", "2.0", "1.75x",
    ]  # fmt: skip
    assert "measured once" in text


def test_growth_without_turns_says_so() -> None:
    lengths = axes(4096)[0]
    one = figure("fxopt", lengths.settings[0], axis="max-len", token_ms=1.0)
    text = grown(dataclasses.replace(results(one), without_turns={"max-len": "no room for b"}), [lengths])
    assert "sizes ran one after the other, so a machine that drifts looks like growth." in text
    assert "no turns: the sizes did not fit into memory at once; no room for b" in text
    assert "in turns" not in text


def test_a_busy_machine_is_said_to_be_busy() -> None:
    assert "busy" not in str(MACHINE)
    assert "The machine was busy: 1.9 processes wanted to run" in str(dataclasses.replace(MACHINE, load=1.9))


# --- CSV -----------------------------------------------------------------------------------------


def test_lines_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    records.append(path, results(figure(tok_s=73.81239, text_hash="0d6aa042", agreed=8), figure("stock, eager")))
    records.append(path, results(figure(trouble="out of memory")))
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == ["fxopt", "stock, eager", "fxopt"]
    first = lines[0]
    assert (first["tok_per_s"], first["hash"], first["same_tokens"]) == ("73.8124", "0d6aa042", "8")
    assert (first["commit"], first["torch"], first["date"]) == ("abc1234", "2.13.0", "2026-11-21")
    assert (first["batch"], first["prompt"], first["new_tokens"], first["max_len"]) == ("1", "20", "8", "28")
    assert lines[2]["trouble"] == "out of memory"
    assert lines[2]["tok_per_s"] == ""


@pytest.mark.parametrize("act", [records.check, lambda path: records.append(path, results(figure()))])
def test_a_file_of_other_columns_is_left_alone(tmp_path: Path, act: Callable[[Path], None]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidRequestError, match="other columns"):
        act(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="there is no folder"):
        records.check(tmp_path / "nothing" / "bench.csv")


def test_what_is_wrong() -> None:
    """Of ours: other tokens where nothing is rounded, and failures; memory and patience may end."""
    found = [
        figure(agreed=8),
        figure("fxopt, whole", agreed=7),
        figure("fxopt, broken", trouble="it broke"),
        figure("fxopt, large", trouble="out of memory"),
        figure("fxopt, late", trouble="not measured"),
        figure("llama.cpp", agreed=7),
        figure("openvino", trouble="it broke"),
    ]
    assert [one.contender for one in results(*found).wrong] == ["fxopt, whole", "fxopt, broken"]
    assert [one.contender for one in results(*found, dtype="bfloat16").wrong] == ["fxopt, broken"]
