"""Split attention: its plain form beside the library's, its kernels beside the plain form, how rows are cut."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from fxopt.split_attention import MOST_SPLITS, obstacle, plain, splits_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def attention(
    heads: int,
    kept: int,
    width: int,
    value_width: int,
    rows: int,
    dtype: torch.dtype,
    mask: str = "none",
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random operands as decode graphs have them: K and V are windows of longer buffers, the query is transposed."""
    random = torch.Generator().manual_seed(heads * 1000 + rows)

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random).to(DEVICE, dtype)

    query = made(batch, 1, heads, width).transpose(1, 2)
    key, value = (made(batch, kept, rows + 37, size)[:, :, :rows] for size in (width, value_width))
    return query, key, value, _mask(mask, batch, heads, rows, dtype, random)


def _mask(kind: str, batch: int, heads: int, rows: int, dtype: torch.dtype, random: torch.Generator) -> Tensor | None:
    match kind:
        case "none":
            return None
        case "left padding":
            seen = torch.arange(rows).expand(batch, 1, 1, rows) >= torch.arange(batch)[:, None, None, None] * 9
        case "holes":
            seen = torch.rand(batch, 1, 1, rows, generator=random) > 0.4
        case "holes by head" | "added by head":
            seen = torch.rand(batch, heads, 1, rows, generator=random) > 0.4
        case "beyond what is filled":  # the first of the sequences has one row, and most parts have none
            seen = torch.arange(rows).expand(batch, 1, 1, rows) <= torch.arange(batch)[:, None, None, None]
        case _:  # nothing, nothing by the least number, nothing by minus infinity
            seen = torch.zeros(batch, 1, 1, rows, dtype=torch.bool)
    if kind.startswith("added"):
        least = float("-inf") if kind == "added infinity" else torch.finfo(dtype).min
        return torch.where(seen, 0.0, least).to(DEVICE, dtype)
    return seen.to(DEVICE)


# --- how rows are cut ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "heads", "rows", "processors", "splits"),
    [
        (1, 32, 1216, 132, 9),  # llama-7b: 32 places where 264 are wanted
        (1, 8, 8192, 132, 33),  # a cache of few heads is cut into more
        (1, 1, 131072, 132, MOST_SPLITS),
        (1, 8, 64, 132, 1),  # no part has less than a block
        (1, 8, 100, 132, 2),
        (64, 32, 4096, 132, 1),  # heads enough without
        (1, 8, 4096, 1, 1),
    ],
)
def test_how_many_splits(sequences: int, heads: int, rows: int, processors: int, splits: int) -> None:
    assert splits_for(sequences, heads, rows, processors) == splits


def test_what_the_kernels_are_not_for() -> None:
    assert obstacle(torch.float16, 71) is None
    assert obstacle(torch.float32, 16) is None
    assert "float64" in str(obstacle(torch.float64, 1))
    assert "16 heads at most, and here are 71" in str(obstacle(torch.float32, 71))


# --- the operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "left padding", "holes by head", "added by head"])
@pytest.mark.parametrize(("heads", "kept"), [(4, 4), (6, 2), (8, 1)])
def test_plain_is_the_library(heads: int, kept: int, mask: str) -> None:
    query, key, value, seen = attention(heads, kept, 24, 40, 70, torch.float32, mask)
    ours = torch.ops.fxopt.split_attention(query, key, value, seen, 0.3, 5)
    theirs = scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask", ["nothing", "added nothing", "added infinity"])
def test_a_row_that_may_attend_to_nothing_gives_the_mean(mask: str) -> None:
    query, key, value, seen = attention(4, 2, 16, 16, 64, torch.float32, mask)
    ours = plain(query, key, value, seen, 0.25)
    assert ours.isfinite().all()
    if mask != "added nothing":  # there the scores are rounded away, but not all of them
        torch.testing.assert_close(ours, value.mean(2, keepdim=True).repeat_interleave(2, 1))


def test_pytorch_is_told_all_about_the_operator() -> None:
    query, key, value, seen = attention(4, 2, 16, 24, 64, torch.float16, "holes")
    given = (query, key, value, seen, 0.25, 3)
    torch.library.opcheck(torch.ops.fxopt.split_attention.default, given)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxopt.split_attention(*given)
    assert counter.get_total_flops() == 2 * 2 * 4 * 64 * (16 + 24)


# --- the kernels: on a GPU, or interpreted -------------------------------------------------------


@pytest.fixture
def launch() -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; PyTorch for CUDA brings it")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    from fxopt.split_kernels import launch

    return launch


MASKS = ["none", "left padding", "holes", "holes by head", "added by head", "beyond what is filled"]
MASKS += ["nothing", "added nothing", "added infinity"]
ALLOWED = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_same(launch: Any, splits: int, block: int, *shape: Any) -> None:
    query, key, value, seen = attention(*shape)
    ours = launch(query, key, value, seen, query.shape[3] ** -0.5, splits, block)
    want = plain(query, key, value, seen, query.shape[3] ** -0.5)
    assert (ours.shape, ours.dtype) == (want.shape, want.dtype)
    assert ours.isfinite().all()
    allowed = ALLOWED[query.dtype]
    torch.testing.assert_close(ours, want, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "kept"), [(3, 3), (4, 2)])
def test_masks(launch: Any, heads: int, kept: int, mask: str) -> None:
    assert_same(launch, 3, 64, heads, kept, 32, 32, 200, torch.float32, mask)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 8])
def test_groups(launch: Any, groups: int, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype is torch.bfloat16 and groups > 1:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices")
    assert_same(launch, 2, 64, 2 * groups, 2, 64, 64, 130, dtype, "holes")


@pytest.mark.parametrize("widths", [(16, 16), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (24, 40)])
@pytest.mark.parametrize("kept", [1, 2])
def test_widths(launch: Any, widths: tuple[int, int], kept: int) -> None:
    assert_same(launch, 2, 64, 2, kept, *widths, 90, torch.float16, "left padding")


@pytest.mark.parametrize("splits", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 320])
def test_rows_and_splits(launch: Any, rows: int, splits: int) -> None:
    """Parts that have no rows at all, and a last one that is cut short."""
    assert_same(launch, splits, 64, 2, 1, 16, 16, rows, torch.float32, "none")


def test_many_heads_that_share_a_key(launch: Any) -> None:
    assert_same(launch, 2, 64, 71, 1, 64, 64, 100, torch.float16, "holes")
