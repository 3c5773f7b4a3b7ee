"""What one call launches, counted by hand."""

from __future__ import annotations

import torch

from fxopt.launches import Layout, call

aten = torch.ops.aten


def layout(*sizes: int) -> Layout:
    return Layout.of(torch.empty(sizes))


def test_flops_of_a_product_however_it_is_written() -> None:
    x, weight = layout(1, 64), layout(32, 64)
    (mm,) = call(aten.linear.default, [x, weight], {}).launches
    (mul,) = call(aten.mul.Tensor, [x, weight], {}).launches
    (total,) = call(aten.sum.dim_IntList, [layout(32, 64), [-1]], {}).launches
    assert mm.flops == mul.flops + total.flops == 2 * 64 * 32


def test_a_lookup_reads_its_rows_and_a_view_reads_nothing() -> None:
    (lookup,) = call(aten.index_select.default, [layout(100, 8), 0, Layout.of(torch.tensor([3, 5]))], {}).launches
    assert [access.nbytes for access in lookup.reads] == [2 * 8 * 4, 2 * 8]
    assert call(aten.transpose.int, [layout(100, 8), 0, 1], {}).launches == ()
    spread = Layout.of(torch.empty(1, 8).expand(100, 8))
    (copy,) = call(aten.clone.default, [spread], {}).launches
    assert (copy.reads[0].nbytes, copy.writes[0].nbytes, copy.copies) == (8 * 4, 100 * 8 * 4, True)


def test_a_cast_copies_only_if_the_dtype_stays() -> None:
    (cast,) = call(aten._to_copy.default, [layout(8)], {"dtype": torch.float64}).launches
    (copy,) = call(aten._to_copy.default, [layout(8)], {"dtype": torch.float32}).launches
    assert (cast.copies, copy.copies) == (False, True)
