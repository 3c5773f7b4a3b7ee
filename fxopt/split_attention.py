"""The attention of one query, its rows shared out among the multiprocessors of a GPU.

    split_attention(query [B, H, 1, D], key [B, H/G, N, D], value [B, H/G, N, E], mask, scale, splits)

A GPU has a hundred multiprocessors and more, and one query has few heads. So the rows of each head
are cut into ``splits`` parts that are worked on at once, all query heads that share a key in one
place; then the parts are joined. On CUDA that is :mod:`fxopt.split_kernels`, elsewhere plain ATen:
the same sums in float32. A row that may attend to nothing gives the mean of the values, not NaN.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BLOCK = 64  # rows that are read at once
PER_PROCESSOR = 2  # parts that a multiprocessor works on at once: one waits for memory, one computes
WIDEST_FLOAT32 = 16  # query heads to a key: more, without tensor cores, takes minutes to compile
MOST_SPLITS = 64  # more would take longer to join than to sum


def splits_for(sequences: int, heads: int, rows: int, processors: int) -> int:
    """Into how many parts rows are cut, so that every multiprocessor has work and every part a block of rows."""
    wanted = -(-PER_PROCESSOR * processors // max(1, sequences * heads))
    blocks = -(-rows // BLOCK)
    return max(1, min(wanted, blocks, MOST_SPLITS))


def processors_of(device: torch.device) -> int:
    """The multiprocessors of a GPU. What runs plain ATen has nothing to share out."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels can be compiled for this device: Triton comes with PyTorch where PyTorch has CUDA."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def obstacle(dtype: torch.dtype, groups: int) -> str | None:
    """Why the kernels are not for such attention, or None."""
    if dtype is torch.float64:
        return "the split kernel sums in float32, which is less than the float64 of this model"
    if dtype is torch.float32 and groups > WIDEST_FLOAT32:
        return f"in float32 the split kernel shares a key among {WIDEST_FLOAT32} heads at most, and here are {groups}"
    return None


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same numbers by operators that every device has."""
    batch, heads, one, width = query.shape
    kept = key.shape[1]
    lowest = torch.finfo(torch.float32).min
    grouped = query.float().reshape(batch, kept, heads // kept, width)
    scores = (grouped @ key.float().transpose(2, 3)) * scale
    if mask is not None:
        aligned = mask.expand(batch, heads, one, key.shape[2]).reshape(scores.shape)
        if mask.dtype is torch.bool:
            scores = scores.masked_fill(~aligned, lowest)
        else:
            scores = (scores + aligned.float()).clamp(min=lowest)
    total = torch.softmax(scores, -1) @ value.float()
    return total.reshape(batch, heads, one, value.shape[3]).to(query.dtype)


@torch.library.custom_op("fxopt::split_attention", mutates_args=())
def split_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, splits: int
) -> Tensor:
    return plain(query, key, value, mask, scale)


@split_attention.register_kernel("cuda")
def _on_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, splits: int) -> Tensor:
    if not has_kernels(query.device):
        return plain(query, key, value, mask, scale)
    from fxopt.split_kernels import launch

    with torch.cuda.device(query.device):
        return launch(query, key, value, mask, scale, splits, BLOCK)


@split_attention.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, splits: int) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@register_flop_formula(torch.ops.fxopt.split_attention)
def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *others: object, **more: object) -> int:
    """A product and a sum for each number of K and of V that a head reads."""
    batch, heads, _, width = query
    return 2 * batch * heads * key[2] * (width + value[3])
