"""The formats of weights: how near they are, in which bytes, and that both ways to multiply with them agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.kv_formats import NOW
from fxopt.weight_formats import CodedWeight, EightBits, FourBits, WeightFormat

FORMATS: dict[str, WeightFormat] = {"int8": EightBits(), "int4": FourBits(32), "int4 by 16": FourBits(16)}
WIDTHS = (64, 96, 576)


def weight(rows: int = 24, width: int = 96) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "most"), [("int8", 0.012), ("int4", 0.1), ("int4 by 16", 0.085)])
def test_how_near(name: str, most: float, width: int) -> None:
    format, given = FORMATS[name], weight(width=width)
    assert 0.1 * most < relative(format.decode(NOW, format.encode(given), width), given) < most


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_sum_of_codes_is_the_product_with_what_they_stand_for(name: str, width: int) -> None:
    format = FORMATS[name]
    parts, vector = format.encode(weight(width=width)), torch.randn(width)
    total = format.total(NOW, vector.view(format.fold(width)), parts, width)
    torch.testing.assert_close(total, format.decode(NOW, parts, width) @ vector, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8 + 32 / 96), ("int4", 5.0 + 1.0), ("int4 by 16", 6.0)])
def test_bits_of_a_number(name: str, bits: float) -> None:
    """Half of 96 numbers has groups of 16 at most."""
    parts = FORMATS[name].encode(weight())
    assert 8 * sum(part.nbytes for part in parts) / (24 * 96) == pytest.approx(bits)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_are_all_the_same(name: str) -> None:
    format = FORMATS[name]
    for value in (0.0, 1.0, -3.0):
        given = torch.full((2, 64), value)
        assert torch.equal(format.decode(NOW, format.encode(given), 64), given) or name == "int8"
        torch.testing.assert_close(format.decode(NOW, format.encode(given), 64), given)


def test_a_weight_that_was_rounded_to_such_groups_before_comes_back() -> None:
    """As those of a file of four bits do: the largest codes of a group are told by its least and its most."""
    format = FourBits(32)
    once = format.decode(NOW, format.encode(weight(width=64)), 64)
    assert relative(format.decode(NOW, format.encode(once), 64), once) < 2e-3


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_rounded_by_themselves(name: str) -> None:
    format, given = FORMATS[name], weight()
    whole, alone = format.encode(given), format.encode(given[3:5])
    for all_rows, two in zip(whole, alone, strict=True):
        assert torch.equal(all_rows[3:5], two)


@pytest.mark.parametrize("name", FORMATS)
def test_large_weights_are_rounded_part_by_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FORMATS[name].encode(weight())
    monkeypatch.setattr("fxopt.weight_formats.MOST_AT_ONCE", 200)
    for one, other in zip(whole, FORMATS[name].encode(weight()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_without_values(name: str) -> None:
    with FakeTensorMode():
        fake = FORMATS[name].encode(torch.empty(24, 96))
    for shaped, real in zip(fake, FORMATS[name].encode(weight()), strict=True):
        assert (shaped.shape, shaped.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(("width", "fits"), [(64, True), (48, True), (16, True), (63, False), (20, False), (8, False)])
def test_rows_that_have_no_groups(width: int, fits: bool) -> None:
    assert (FourBits(32).obstacle(width) is None) == fits
    assert EightBits().obstacle(width) is None


def test_weights_behind_each_other_and_turned() -> None:
    first, second = weight(8), weight(16)
    both = CodedWeight("w", ("a", "b"), "int8", None, turned=False).encode([first, second])
    assert both[0].shape == (24, 96)
    turned = CodedWeight("w", ("a",), "int8", None, turned=True)
    parts = turned.encode([first.t().contiguous()])
    assert turned.parts == ("w_codes", "w_scale")
    torch.testing.assert_close(turned.decoded(parts, 96, torch.float32), first.t(), atol=0.02, rtol=0)
