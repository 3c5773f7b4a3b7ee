"""Which layers are streamed, and what a step costs then: beside every other choice there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from fxopt.errors import InvalidRequestError
from fxopt.offload.amounts import bytes_of, told
from fxopt.offload.placement import Placement, place, smallest_budget, spread
from fxopt.offload.prediction import Rates, predict


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("200 MiB", 200 << 20), ("1.5GB", 1_500_000_000), ("64kB", 64000), (77, 77), ("12", 12)],
)
def test_amounts(text: str | int, nbytes: int) -> None:
    assert bytes_of("budget", text) == nbytes


@pytest.mark.parametrize("text", ["", "8 gibs", "-1GiB", "0", 0, -3, True, 1.5, None, "GiB", "1e9"])
def test_what_is_no_amount(text: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"budget=.* is no number of bytes; .*8GiB"):
        bytes_of("budget", text)


def test_amounts_in_sentences() -> None:
    assert [told(n) for n in (5, 1024, 3 << 29)] == ["5 B", "1 KiB", "1.5 GiB"]


def subsets(layers: int) -> Iterator[tuple[int, ...]]:
    for count in range(layers + 1):
        yield from itertools.combinations(range(layers), count)


def fits(sizes: tuple[int, ...], fixed: int, chosen: tuple[int, ...], slots: int, budget: int) -> bool:
    return Placement(sizes, fixed, chosen, min(slots, len(chosen))).device_bytes <= budget


@pytest.mark.parametrize("seed", range(60))
def test_a_budget_is_kept_and_found_impossible_only_if_it_is(seed: int) -> None:
    draw = random.Random(seed)
    alike = seed % 2 == 0
    sizes = tuple([draw.randint(1, 9)] * 7 if alike else (draw.randint(1, 9) for _ in range(7)))
    fixed, depth = draw.randint(0, 10), draw.randint(1, 4)
    budget = draw.randint(fixed + 1, fixed + sum(sizes) + 3)
    able = [chosen for chosen in subsets(7) if fits(sizes, fixed, chosen, depth, budget)]
    if not able:
        with pytest.raises(InvalidRequestError, match=f"{smallest_budget(sizes, fixed, depth):,}"):
            place(sizes, fixed, budget=budget, depth=depth)
        return
    made = place(sizes, fixed, budget=budget, depth=depth)
    assert made.device_bytes <= budget
    assert made.slots == min(depth, len(made.offloaded))
    least = min(sum(sizes[layer] for layer in chosen) for chosen in able)
    assert made.moved == least if alike else made.moved <= least + max(sizes)


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_budget_is_enough_and_less_is_not(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 30) for _ in range(draw.randint(2, 8))]
    fixed, depth = draw.randint(0, 9), draw.randint(1, 3)
    least = smallest_budget(sizes, fixed, depth)
    assert place(sizes, fixed, budget=least, depth=depth).device_bytes <= least
    with pytest.raises(InvalidRequestError, match="give at least"):
        place(sizes, fixed, budget=least - 1, depth=depth)


@pytest.mark.parametrize("layers", range(1, 40))
def test_layers_are_spread_evenly(layers: int) -> None:
    for count in range(layers + 1):
        chosen = spread(range(layers), count)
        assert len(set(chosen)) == count
        gaps = [(after - before) % layers for before, after in itertools.pairwise((*chosen, *chosen[:1]))]
        assert len(set(gaps)) <= 2
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("layers", [4, 6, 8])
def test_no_other_choice_of_as_many_is_faster_by_more_than_four_in_a_hundred(layers: int, slots: int) -> None:
    for count, ratio in itertools.product(range(1, layers + 1), (0.3, 0.5, 1.0, 1.5, 3.0)):
        sizes, rates = [1000] * layers, Rates(1000 / ratio, (1.0,) * layers, rest=0.3)
        best = min(predict(sizes, chosen, slots, rates).step for chosen in itertools.combinations(range(layers), count))
        assert predict(sizes, spread(range(layers), count), slots, rates).step <= 1.04 * best


def test_more_slots_for_fewer_resident_layers_pay_little() -> None:
    """Why there are two unless somebody asks: in the same memory, more of them gain at most four in a hundred."""
    layers = 12
    for memory, ratio in itertools.product(range(3, 11), (0.5, 1.0, 1.2, 1.5, 2.0, 4.0)):
        rates = Rates(1.0 / ratio, (1.0,) * layers, rest=0.5)
        steps = {
            slots: predict([1] * layers, spread(range(layers), layers - memory + slots), slots, rates).step
            for slots in range(2, min(memory, 6) + 1)
        }
        assert steps[2] <= 1.04 * min(steps.values())


@pytest.mark.parametrize("seed", range(40))
def test_a_step_takes_no_less_than_the_slower_part_and_no_more_than_both(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 50) for _ in range(draw.randint(1, 9))]
    rates = Rates(draw.uniform(1, 30), tuple(draw.uniform(0.1, 3) for _ in sizes), draw.uniform(0, 2))
    chosen = tuple(sorted(draw.sample(range(len(sizes)), draw.randint(0, len(sizes)))))
    found = [predict(sizes, chosen, slots, rates) for slots in range(1, 5)]
    for one in found:
        assert one.ideal <= one.step * (1 + 1e-6)
        assert one.step <= (one.copy + one.compute) * (1 + 1e-6)
        assert one.hidden + one.exposed == pytest.approx(max(one.copy, one.exposed), abs=1e-6)
        assert one.moved == sum(sizes[layer] for layer in chosen)
    for fewer, more in itertools.pairwise(found):  # a slot more never costs time
        assert more.step <= fewer.step * (1 + 1e-6)


def test_one_slot_hides_nothing_and_two_hide_all_when_balanced() -> None:
    rates = Rates(100.0, (1.0,) * 8)
    series, hidden = (predict([100] * 8, range(8), slots, rates) for slots in (1, 2))
    assert (series.step, series.hidden) == pytest.approx((16.0, 0.0))
    assert (hidden.step, hidden.exposed) == pytest.approx((8.0, 0.0))


def test_a_share_and_the_slots_of_its_longest_run() -> None:
    made = place([10] * 8, 5, resident=0.5)
    assert (made.offloaded, made.resident, made.longest_run, made.slots) == ((1, 3, 5, 7), (0, 2, 4, 6), 1, 2)
    assert made.device_bytes == 5 + 40 + 20
    assert place([10] * 8, resident=0.25).slots == 3  # runs of three
    assert place([10] * 8, resident=0.25, depth=2).slots == 2
    assert place([10] * 8, resident=0.0).slots == 2  # a slot for each would be all of them
    assert place([10] * 8, resident=1.0).offloaded == ()
    assert len(place([10] * 3, resident=0.5).resident) == 2  # at least the share


def test_what_is_left_of_a_budget_goes_to_slots() -> None:
    sizes = [10, 10, 10, 10, 90]  # the large one stays, and its size leaves no room for one more
    made = place(sizes, budget=90 + 20)
    assert (made.offloaded, made.slots) == ((0, 1, 2, 3), 2)
    assert place(sizes, budget=90 + 19).slots == 1
    assert place([10] * 6, budget=60).offloaded == ()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either a budget in bytes, or the share"),
        ({"budget": 9, "resident": 0.5}, "give either"),
        ({"resident": 1.5}, "resident=1.5 is no share of the layers"),
        ({"resident": 0.5, "depth": 0}, "depth=0 is too small"),
        ({"budget": 12, "depth": 2}, r"2 slots of a layer \(10 B to 10 B\); give at least 25 bytes, or depth=1 and 15"),
        ({"budget": 14}, r"always stays \(5 B .*\) and 1 slot of a layer .*; give at least 15 bytes$"),
    ],
)
def test_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        place([10] * 6, 5, **options)
