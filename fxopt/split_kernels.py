"""The kernels of :mod:`fxopt.split_attention`, in Triton: one that sums parts of the rows, one that joins the parts.

Every part keeps a running maximum, the sum of exponents and the weighted sum of values, in float32; with the
maxima the parts can be joined. Exponents are of base two, which is what the hardware has.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = 16  # of each side of a product that tensor cores do
NUMBERS = 8192  # of a block of rows: what the registers of a program have room for
COLUMNS = 64  # of a value that one program joins

# Finite, and far enough from the edge of float32 that a maximum can be subtracted: what may attend to nothing
# then has equal weights. Beyond the last row there is nothing, not even little.
LOWEST = tl.constexpr(-3.0e38)
NOTHING = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    query,
    key,
    value,
    mask,
    parts,  # [B, H, SPLITS, E]
    peaks,  # [B, H, SPLITS]
    totals,  # [B, H, SPLITS]
    scale,
    rows,
    kept,
    groups,
    query_batch,
    query_head,
    query_column,
    key_batch,
    key_head,
    key_row,
    key_column,
    value_batch,
    value_head,
    value_row,
    value_column,
    mask_batch,
    mask_head,
    mask_row,
    SPLITS: tl.constexpr,  # noqa: N803 - what is known when the kernel is compiled is written so
    GROUPS: tl.constexpr,  # noqa: N803
    width: tl.constexpr,
    WIDTH: tl.constexpr,  # noqa: N803
    value_width: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    MASK: tl.constexpr,  # noqa: N803
    PRODUCTS: tl.constexpr,  # noqa: N803
):
    """All query heads that read one head of K and V, over one part of its rows."""
    batch = (tl.program_id(0) // kept).to(tl.int64)
    head = (tl.program_id(0) % kept).to(tl.int64)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(rows, SPLITS), ROWS) * ROWS
    first = split * share
    last = tl.minimum(first + share, rows)

    group = tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    column_of_value = tl.arange(0, VALUE_WIDTH)
    heads = head * groups + group
    is_head = group < groups
    q = tl.load(
        query + batch * query_batch + heads[:, None] * query_head + column[None, :] * query_column,
        mask=is_head[:, None] & (column[None, :] < width),
        other=0.0,
    )
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head

    peak = tl.full([GROUPS], NOTHING, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    gathered = tl.zeros([GROUPS, VALUE_WIDTH], tl.float32)
    for start in range(first, last, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        is_row = row < last
        k = tl.load(
            keys + row[:, None] * key_row + column[None, :] * key_column,
            mask=is_row[:, None] & (column[None, :] < width),
            other=0.0,
        )
        if PRODUCTS:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:  # one head
            scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        scores = scores * (scale * LOG2_E)
        if MASK != "none":
            seen = tl.load(
                mask + batch * mask_batch + heads[:, None] * mask_head + row[None, :] * mask_row,
                mask=is_head[:, None] & is_row[None, :],
                other=0,
            )
            if MASK == "bool":
                scores = tl.where(seen != 0, scores, LOWEST)
            else:
                scores = tl.maximum(scores + seen.to(tl.float32) * LOG2_E, LOWEST)
        scores = tl.where(is_row[None, :], scores, NOTHING)

        higher = tl.maximum(peak, tl.max(scores, 1))
        shrunk = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        v = tl.load(
            values + row[:, None] * value_row + column_of_value[None, :] * value_column,
            mask=is_row[:, None] & (column_of_value[None, :] < value_width),
            other=0.0,
        )
        if PRODUCTS:
            weighted = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            weighted = tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        total = total * shrunk + tl.sum(weights, 1)
        gathered = gathered * shrunk[:, None] + weighted
        peak = higher

    place = (batch * kept * groups + heads) * SPLITS + split
    tl.store(peaks + place, peak, mask=is_head)
    tl.store(totals + place, total, mask=is_head)
    tl.store(
        parts + place[:, None] * value_width + column_of_value[None, :],
        gathered,
        mask=is_head[:, None] & (column_of_value[None, :] < value_width),
    )


@triton.jit
def _join(
    parts,
    peaks,
    totals,
    result,  # [B, H, 1, E]
    value_width,
    SPLITS: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Some columns of one head's result. A part without rows has no maximum, and so no weight."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, PADDED)
    is_split = split < SPLITS
    place = head * SPLITS + split
    peak = tl.load(peaks + place, mask=is_split, other=NOTHING)
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(weight * tl.load(totals + place, mask=is_split, other=0.0), 0)
    part = tl.load(
        parts + place[:, None] * value_width + column[None, :],
        mask=is_split[:, None] & (column[None, :] < value_width),
        other=0.0,
    )
    joined = tl.sum(weight[:, None] * part, 0) / total
    tl.store(result + head * value_width + column, joined, mask=column < value_width)


def launch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, splits: int, block: int
) -> Tensor:
    """Both kernels, on tensors as they lie: K and V are windows of larger buffers. ``block`` rows are read at once."""
    batch, heads, _, width = query.shape
    kept, rows, value_width = key.shape[1], key.shape[2], value.shape[3]
    groups = heads // kept
    room: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    parts = torch.empty((batch, heads, splits, value_width), **room)
    peaks, totals = torch.empty((batch, heads, splits), **room), torch.empty((batch, heads, splits), **room)
    result = torch.empty((batch, heads, 1, value_width), dtype=query.dtype, device=query.device)
    seen, kind = _seen(mask, batch, heads, rows)
    steps = (0, 0, 0) if seen is None else (seen.stride(0), seen.stride(1), seen.stride(3))
    padded, value_padded = _padded(width), _padded(value_width)
    products = groups > 1
    numbers = NUMBERS if products else NUMBERS // 2  # K and V are held in float32 then
    _attend[(batch * kept, splits)](
        query,
        key,
        value,
        query if seen is None else seen,  # which is not read
        parts,
        peaks,
        totals,
        scale,
        rows,
        kept,
        groups,
        *(query.stride(dim) for dim in (0, 1, 3)),
        *key.stride(),
        *value.stride(),
        *steps,
        SPLITS=splits,
        GROUPS=_padded(groups) if products else 1,
        width=width,
        WIDTH=padded,
        value_width=value_width,
        VALUE_WIDTH=value_padded,
        ROWS=max(LEAST, min(block, numbers // max(padded, value_padded))),
        MASK=kind,
        PRODUCTS=products,
        num_warps=4,
        num_stages=2,
    )
    columns = min(COLUMNS, value_padded)
    _join[(batch * heads, triton.cdiv(value_width, columns))](
        parts,
        peaks,
        totals,
        result,
        value_width,
        SPLITS=splits,
        PADDED=triton.next_power_of_2(splits),
        COLUMNS=columns,
    )
    return result


def _padded(size: int) -> int:
    return max(LEAST, int(triton.next_power_of_2(size)))


def _seen(mask: Tensor | None, batch: int, heads: int, rows: int) -> tuple[Tensor | None, str]:
    """The mask for every head, in the memory that it has, and how it is to be read."""
    if mask is None:
        return None, "none"
    every = mask.expand(batch, heads, 1, rows)
    return (every.view(torch.uint8), "bool") if mask.dtype is torch.bool else (every, "added")
