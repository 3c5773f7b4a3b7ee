"""Rows in fewer bits: how far a number may be off, what a row costs, and rows that are no numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounded_caches import NAMES
from torch import Tensor

from fxopt.cache import BufferSet
from fxopt.kv_formats import FORMATS, FormatName, KVFormat, hadamard
from fxopt.program import Facts, KVShape, Rows

CPU = torch.device("cpu")


#: The largest error of a number: in codes of the row's largest, and of the number itself.
BOUNDS: dict[FormatName, tuple[float, float]] = {
    "int8": (0.5 / 127 * (1 + 2**-7), 0.0),
    "fp8": (2.0**-10 / 448 * (1 + 2**-7), 2.0**-4),
}


def rows_of(width: int, kind: int, name: FormatName, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows("key_0", 2, width, dtype, CPU, FORMATS[name][kind])


def samples(width: int) -> dict[str, Tensor]:
    noise = torch.randn(2, 2, 33, width, generator=torch.Generator().manual_seed(width))
    outlier = noise.clone()
    outlier[..., 3] += 40.0
    return {
        "noise": noise,
        "one large": outlier,
        "of one sign": noise.abs() + 5.0,
        "tiny": 1e-4 * noise,
        "huge": 200.0 * noise,
        "zeros": torch.zeros_like(noise),
    }


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_no_number_is_off_by_more_than_the_format_says(name: FormatName, width: int) -> None:
    of_row, of_number = BOUNDS[name]
    kept = rows_of(width, 0, name)
    for kind, rows in samples(width).items():
        found = kept.decode(kept.encode(rows))
        allowed = of_row * rows.abs().amax(-1, keepdim=True) + of_number * rows.abs()
        assert bool(((found - rows).abs() <= allowed + 1e-30).all()), kind


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_no_row_is_off_by_more_than_int4_says(width: int, kind: int) -> None:
    """By length, since rows are turned: half a step for each number, and what is cut off at the ends of a group."""
    kept = rows_of(width, kind, "int4")
    members = width // 2 // kept.buffers[1].width
    for name, rows in samples(width).items():
        error = (kept.decode(kept.encode(rows)) - rows).norm(dim=-1)
        largest = kept.turned(rows).unflatten(-1, (-1, members)).abs().amax(-1)
        scale = largest.amax(-1, keepdim=True) / 7.65 * (1 + 2**-3) + 2.0**-24  # of the row, rounded up
        step = largest / 7.65 + scale / 16  # a group may have half a share too many, and has one at least
        cut = (largest - 7.5 * (largest / 7.65 - scale / 32)).clamp(min=0)
        allowed = ((0.5 * step).maximum(cut).square() * members).sum(-1).sqrt()
        assert bool((error <= allowed * 1.001).all()), name
        if name == "noise":
            assert float((error / rows.norm(dim=-1)).mean()) < 0.1


def test_one_large_number_does_not_cost_the_others_theirs() -> None:
    """What the turning is for."""
    rows, kept = samples(64)["one large"], rows_of(64, 0, "int4")
    found = kept.decode(kept.encode(rows))
    scale = rows.abs().amax(-1, keepdim=True) / 7
    plain = (rows / scale).round() * scale
    assert float((found - rows).norm()) < 0.6 * float((plain - rows).norm())


@pytest.mark.parametrize("size", [8, 16, 64])
def test_turned_twice_is_as_before(size: int) -> None:
    torch.testing.assert_close(hadamard(size) @ hadamard(size), torch.eye(size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_of_zeros_is_read_as_zeros(name: FormatName) -> None:
    """Rows that nobody has written are masked, and must be numbers all the same."""
    for kind in (0, 1):
        kept = rows_of(64, kind, name)
        parts = [torch.zeros(buffer.shape(1, 5), dtype=buffer.dtype) for buffer in kept.buffers]
        assert float(kept.decode(parts).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_rows_come_back_in_the_dtype_of_the_model(name: FormatName, dtype: torch.dtype) -> None:
    kept, rows = rows_of(64, 0, name, dtype), samples(64)["noise"].to(dtype)
    found = kept.decode(kept.encode(rows))
    assert found.dtype is dtype
    assert float((found.float() - rows.float()).norm() / rows.float().norm()) < 0.1


@pytest.mark.parametrize(("name", "most"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.28)])
@pytest.mark.parametrize("width", [64, 128])
def test_bytes(name: FormatName, most: float, width: int) -> None:
    """Beside bfloat16, scales included; and what is counted is what is allocated."""
    shape = KVShape(3, width, 3, width, name, name)
    facts = Facts((shape,) * 2, 128, 100, torch.float32, CPU, 0, 0, 0, tuple)
    half = replace(facts, layers=(KVShape(3, width, 3, width),) * 2, dtype=torch.bfloat16)
    sets = [BufferSet(one, 2) for one in (facts, half)]
    kept, plain = (sum(tensor.nbytes for tensor in one.tensors.values()) for one in sets)
    assert kept <= most * plain
    assert all(one.nbytes - one.mask.nbytes == nbytes for one, nbytes in zip(sets, (kept, plain), strict=True))


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(name: FormatName, odd: float) -> None:
    """In its own row; the others are as without it."""
    kept, rows = rows_of(64, 0, name), samples(64)["noise"]
    expected = kept.decode(kept.encode(rows))
    rows[1, 0, 7, 5] = odd
    found = kept.decode(kept.encode(rows))
    assert not bool(found[1, 0, 7, 5].isfinite())
    found[1, 0, 7] = expected[1, 0, 7]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e9])
def test_int4_keeps_numbers_whatever_comes(odd: float) -> None:
    """Its scale ends at 240; the other rows are as without it."""
    kept, rows = rows_of(64, 1, "int4"), samples(64)["noise"]
    expected = kept.decode(kept.encode(rows))
    rows[1, 0, 7] = odd
    found = kept.decode(kept.encode(rows))
    assert bool(found.isfinite().all())
    found[1, 0, 7] = expected[1, 0, 7]
    assert torch.equal(found, expected)


def test_the_matrix_is_the_same_whoever_asks_first() -> None:
    """It is kept: neither a default of torch nor a mode may get into it."""
    hadamard.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        made = hadamard(8)
    assert (made.device, made.dtype, made.is_inference()) == (CPU, torch.float32, False)


def test_formats_are_formats() -> None:
    for pair in FORMATS.values():
        for one in pair:
            format: KVFormat = one  # what mypy checks
            assert format.parts(64)[0].suffix == ""
