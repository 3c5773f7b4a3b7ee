"""Plans as YAML, as CSV and as pictures; what people edited is checked."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
from memory_problems import chain_problem, random_problem

from fxopt.cli import main
from fxopt.errors import InvalidRequestError
from fxopt.memory import (
    Buffer,
    MemoryPlan,
    PlanError,
    Problem,
    SymbolicBuffer,
    SymbolicProblem,
    draw,
    from_dict,
    plan,
    plan_sets,
    plan_symbolic,
    read_csv,
    read_yaml,
    to_dict,
    write_csv,
    write_yaml,
)

SVG = "{http://www.w3.org/2000/svg}"


def symbolic() -> MemoryPlan:
    b, s = sympy.symbols("b s", integer=True, positive=True)
    buffers = (
        SymbolicBuffer("x", 0, 2, 4 * b * s),
        SymbolicBuffer("y", 1, 3, sympy.floor(b * s / 3) * 8, kind="logits"),
        SymbolicBuffer("z", 0, 3, 12, 128),
    )
    return plan_symbolic(
        SymbolicProblem(buffers), [{"b": 1, "s": 512}, {"b": 8, "s": 1}], shapes=[{"ids": [1, 512]}, {"ids": [8, 1]}]
    )


def several(merge: str) -> MemoryPlan:
    problems = [chain_problem(1, tokens=16), chain_problem(1, tokens=1, past=15)]
    return plan_sets(problems, merge)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [symbolic, *(lambda merge=merge: several(merge) for merge in ("tables", "max", "order"))]
)
def test_a_plan_comes_back_from_yaml(make: Callable[[], MemoryPlan]) -> None:
    made = make()
    text = write_yaml({"ActivationDAG": {"ActivationOperator": {}}, **to_dict(made)})
    back = from_dict(read_yaml(text))
    assert to_dict(back) == to_dict(made)
    assert (back.arena, back.lower_bound, back.status, back.merge) == (
        made.arena,
        made.lower_bound,
        made.status,
        made.merge,
    )
    assert [each.offsets for each in back.plans] == [each.offsets for each in made.plans]
    assert [each.problem for each in back.plans] == [each.problem for each in made.plans]
    if made.symbolic:
        values = {"b": 3, "s": 77}
        assert back.for_any_shape().at(values) == made.for_any_shape().at(values)


def test_unaligned_and_unpadded_buffers_come_back() -> None:
    made = plan_sets([random_problem(3, 20, aligns=(1, 16, 64))])
    assert to_dict(from_dict(read_yaml(write_yaml(to_dict(made))))) == to_dict(made)


def test_the_block_is_as_documented() -> None:
    block = to_dict(symbolic())["MemoryPlan"]
    assert list(block) == ["version", "alignment", "merge", "mode", "sets", "buffers", "order"]
    assert block["sets"][0]["shapes"] == {"ids": [1, 512]}
    assert block["sets"][0]["symbols"] == {"b": 1, "s": 512}
    assert block["buffers"]["x"] == {"life": [0, 2], "bytes": "4*b*s", "kind": "activation"}
    assert block["buffers"]["z"] == {"life": [0, 3], "bytes": "12", "kind": "activation", "align": 128}
    assert all(len(pair) == 2 for pair in block["order"])


def edited(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = {
        "MemoryPlan": {
            "version": 1,
            "alignment": 64,
            "merge": "tables",
            "mode": "inference",
            "sets": [
                {"lower_bound": 128, "arena": 192, "status": "feasible", "offsets": {"one": 0, "two": 64, "late": 0}}
            ],
            "buffers": {
                "one": {"life": [0, 2], "bytes": 60},
                "two": {"life": [1, 3], "bytes": 64, "kind": "activation"},
                "late": {"life": [3, 4], "bytes": 128},
            },
        }
    }
    change(document["MemoryPlan"])
    return document


def test_what_is_said_of_quality_is_found_out_again() -> None:
    made = from_dict(edited(lambda block: block["sets"][0].update(status="optimal", lower_bound=1)))
    assert (made.status, made.lower_bound, made.arena) == ("feasible", 128, 192)
    made = from_dict(edited(lambda block: block["sets"][0].update(proven=192)))
    assert (made.status, made.gap) == ("optimal", 0.0)


EDITS: list[tuple[Callable[[dict[str, Any]], object], list[str]]] = [
    (lambda b: b["sets"][0]["offsets"].update(two=0), ["one (bytes 0 to 64", "two (bytes 0 to 64", "share bytes"]),
    (lambda b: b["sets"][0]["offsets"].update(two=-64), ["the offset of two", "-64"]),
    (lambda b: b["sets"][0]["offsets"].update(two=65), ["two lies at 65", "alignment 64"]),
    (lambda b: b["sets"][0]["offsets"].update(two=640), ["two", "outside the arena", "192"]),
    (lambda b: b["sets"][0]["offsets"].update(two="64"), ["the offset of two", "'64'"]),
    (lambda b: b["sets"][0]["offsets"].update(two=True), ["the offset of two", "True"]),
    (lambda b: b["sets"][0]["offsets"].pop("two"), ["two has 64 bytes and no place"]),
    (lambda b: b["sets"][0]["offsets"].update(three=0), ["three", "no such buffer"]),
    (lambda b: b["sets"][0].update(arena=128, proven=192), ["proven", "192"]),
    (lambda b: b["sets"][0].update(arena=64), ["outside the arena"]),
    (lambda b: b["sets"][0].update(status="best"), ["sets[0]: status", "optimal, feasible"]),
    (lambda b: b["sets"][0].update(colour=1), ["sets[0] has 'colour'", "known are"]),
    (lambda b: b["sets"][0].update(shapes={"ids": [1, -2]}), ["the shape of ids", "-2"]),
    (lambda b: b["sets"][0].pop("arena"), ["sets[0] has no 'arena'"]),
    (lambda b: b.update(sets=[]), ["sets has 0 entries"]),
    (lambda b: b.update(version=2), ["version 2", "reads 1"]),
    (lambda b: b.update(merge="min"), ["merge", "tables, max, order"]),
    (lambda b: b.update(mode="fast"), ["mode", "inference, debug"]),
    (lambda b: b.update(alignment=0), ["alignment", "0"]),
    (lambda b: b.update(order=[["one", "two"]]), ['merge is "tables"', "an order is given"]),
    (lambda b: b.update(merge="order"), ['merge is "order"', "not given"]),
    (lambda b: b.update(merge="order", order=[["one", "two"], ["two", "one"]]), ["circle", "lies below itself"]),
    (lambda b: b.update(merge="order", order=[]), ["one and two", "lies below the other"]),
    (lambda b: b.update(merge="order", order=[["one", "six"]]), ["six", "no such buffer"]),
    (lambda b: b.update(merge="order", order=[["two", "one"]]), ["by the order it lies at"]),
    (lambda b: b.update(merge="order", order=[["two"]]), ["a pair in order has 1"]),
    (lambda b: b["buffers"]["one"].update(bytes=-1), ["the bytes of one", "-1"]),
    (lambda b: b["buffers"]["one"].update(bytes=10**30), ["the bytes of one"]),
    (lambda b: b["buffers"]["one"].update(bytes=[1, 2]), ["the bytes of one has 2 entries, and should have 1"]),
    (lambda b: b["buffers"]["one"].update(bytes="4*s"), ["s", "no value"]),
    (lambda b: [b["buffers"]["one"].update(bytes="4"), b["buffers"]["two"].update(bytes=[4])], ["the bytes of two"]),
    (lambda b: b["buffers"]["one"].update(bytes="open('x')"), ["open('x')", "cannot be read"]),
    (lambda b: b["buffers"]["one"].update(life=[2, 2]), ["one lives from 2 up to 2"]),
    (lambda b: b["buffers"]["one"].update(life=[0]), ["the life of one has 1 entries"]),
    (lambda b: b["buffers"]["one"].update(align="64"), ["the alignment of one"]),
    (lambda b: b["buffers"]["one"].update(padded=1), ["one: padded", "true or false"]),
    (lambda b: b.update(buffers=[1]), ["buffers should be a table"]),
    (lambda b: b.pop("buffers"), ["MemoryPlan has no 'buffers'"]),
]


@pytest.mark.parametrize(("change", "words"), EDITS)
def test_an_edited_plan_is_refused(change: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    from_dict(edited(lambda block: None)).verify()
    with pytest.raises((PlanError, InvalidRequestError)) as caught:
        from_dict(edited(change))
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: *x\n", "refers to itself"),
        ("a: 1\na: 2\n", "'a' is there twice"),
        ("1: 2\n", "1 is no name"),
        ("a: !!python/object/apply:os.system [ls]\n", "no YAML"),
        ("a: [1, 2\n", "no YAML"),
        ("- 1\n", "is a list"),
        ("", "is a NoneType"),
        ("a: 1\n---\nb: 2\n", "no YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 50 deep"),
    ],
)
def test_texts_that_are_no_documents(text: str, word: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_yaml(text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_look_like_something_else_come_back() -> None:
    names = ["1", "no", "1e3", "~", "a: b", "ü", "- x", "null", "0x10", "#"]
    made = plan_sets([Problem(Buffer(name, 0, 1, 64) for name in names)])
    assert list(from_dict(read_yaml(write_yaml(to_dict(made)))).plans[0].offsets) == names


CSV = "note,size,upper,id,lower,alignment\nfirst,100,3,a,0,\nsecond,50,4,b,2,64\nthird,0,4,c,2,1\n"


def test_a_csv_comes_back_with_offsets() -> None:
    table = read_csv(CSV)
    a, b, c = table.problem.buffers
    assert (a.start, a.end, a.size, a.align, b.align, b.size, c.size) == (0, 3, 100, 1, 64, 50, 0)
    made = plan(table.problem)
    assert made.size == 150 + 0, "an alignment concerns the offset alone: b lies below"
    text = write_csv(table, made)
    assert text.splitlines() == [
        "note,size,upper,id,lower,alignment,offset",
        "first,100,3,a,0,,50",
        "second,50,4,b,2,64,0",
        "third,0,4,c,2,1,0",
    ]
    assert write_csv(read_csv(text), made) == text, "an offset that is there is written anew"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column 'id'"]),
        ("id,lower,upper\n", ["no column 'size'"]),
        ("id,lower,upper,size,size\n", ["two columns"]),
        ("id,lower,upper,size\na,0,1\n", ["line 2", "4 fields"]),
        ("id,lower,upper,size\na,0,1,2,3\n", ["line 2", "4 fields"]),
        ("id,lower,upper,size\na,0,x,1\n", ["line 2: upper is 'x'"]),
        ("id,lower,upper,size\na,0,1,1.5\n", ["size is '1.5'"]),
        ("id,lower,upper,size\na,1,1,1\n", ["a lives from 1 up to 1"]),
        ("id,lower,upper,size\na,0,1,1\na,0,1,1\n", ["a is there twice"]),
        ('id,lower,upper,size\n"a,0,1,1\n', ["no CSV"]),
    ],
)
def test_csv_refusals(text: str, words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_csv(text)
    for word in words:
        assert word in str(caught.value)


def test_the_command_plans_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, picture = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "plan.svg"
    source.write_text(CSV)
    assert main(["plan", "--csv", str(source), "--out", str(out), "--capacity", "150", "--svg", str(picture)]) == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert next(row[:5] for row in rows if row[:2] == ["this", "plan"]) == ["this", "plan", "150", "1.000", "optimal"]
    assert {"naive", "itrex", "executorch", "tflite", "greedy"} <= {row[0] for row in rows if row}
    assert printed.err.splitlines() == [f"offsets: {out}", f"picture: {picture}"]
    assert out.read_text() == write_csv(read_csv(CSV), plan(read_csv(CSV).problem))
    assert ElementTree.parse(picture).getroot().tag == f"{SVG}svg"


def test_the_command_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(CSV)
    assert main(["plan", "--csv", str(source), "--out", str(out), "--capacity", "149"]) == 1
    assert "149 bytes are too few: 150 are needed at least" in capsys.readouterr().err
    assert not out.exists()
    assert main(["plan", "--csv", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
    source.write_bytes(b"\xff\xfe")
    assert main(["plan", "--csv", str(source)]) == 2
    assert "is no text file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "--csv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--csv", "x", "--budget", "0"])
    assert "give seconds above 0" in capsys.readouterr().err


def test_a_picture_has_every_buffer_and_what_is_said_of_it() -> None:
    problem = Problem(
        [
            Buffer("<a>", 0, 2, 100, kind="x & y"),
            Buffer("b\x07", 1, 3, 5000),
            Buffer("none", 0, 3, 0),
            Buffer("c", 9, 10, 1),
        ]
    )
    made = plan(problem)
    root = ElementTree.fromstring(draw(made, 'A "plan"', {"<a>": "read by <b>"}))
    assert root.get("aria-label") == 'A "plan"'
    shown = [one for one in root.iter(f"{SVG}rect") if "buffer" in str(one.get("class"))]
    titles = ["".join(one.itertext()) for one in shown]
    assert titles[0] == f"<a> (x & y)\n100 bytes (100 B) at {made.offsets['<a>']:,}\nsteps 0 to 2\nread by <b>"
    assert [title.split(" ")[0] for title in titles] == ["<a>", "b\ufffd", "c"]
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert "x & y" in texts
    assert any(text.endswith("lower bound 5.062 KiB") for text in texts)
    bottoms = [float(str(one.get("y"))) + float(str(one.get("height"))) for one in shown]
    assert max(bottoms) <= 520 - 44 + 0.01
    assert min(float(str(one.get("y"))) for one in shown) >= 64 - 0.01


def test_a_picture_of_nothing_is_a_picture() -> None:
    root = ElementTree.fromstring(draw(plan(Problem([]))))
    assert not [one for one in root.iter(f"{SVG}rect") if "buffer" in str(one.get("class"))]
