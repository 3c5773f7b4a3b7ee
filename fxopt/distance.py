"""How far what a graph says is from what the stock model says, and how far it may be.

The limit is measured, not guessed: the stock model is compared with itself in the next wider dtype,
and a rewritten graph may be no further from that truth than FACTOR times the stock model's own noise,
or a few roundings where the stock model happens to be exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.scenarios import Answer, Answered

FACTOR = 4.0
FLOOR = 2.0  # roundings of the dtype
TOKEN_FACTOR = 2 * 5 * FACTOR  # two logits change places when both are off; five deviations are never seen
#: How far from the truth a stock model is by rounding alone. One that is further away takes decisions
#: that rounding turns over (which expert is chosen): then it is itself the truth.
PLAUSIBLE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
#: In half precision a rounding may turn over which expert a token goes to, in ours and not in theirs: a
#: token of tiny random mixtures then differs by a third. Float32 is as strict with mixtures as with others.
CHOICE_NOISE = 0.125
#: A cache of fewer bits is compared with the stock model over such a cache. Both round what they write, and each
#: is as far from the stock model as it is as the format moves it.
BOTH_ROUND = 2.0
#: Where nothing is wider than the dtype. Models compute rotary tables in float32 also in float64.
WITHOUT_TRUTH = {
    torch.float64: 1e3 * torch.finfo(torch.float32).eps,
    torch.float32: 1e3 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 32 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 32 * torch.finfo(torch.float16).eps,
}


@dataclass(frozen=True)
class Rounding:
    """The dtype that a model computes in, and whether it was run in a wider one."""

    dtype: torch.dtype
    has_truth: bool = True

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps


@dataclass(frozen=True)
class Difference:
    """One kind of number, how far it is off and how far it may be."""

    label: str
    error: float
    allowed: float
    sentence: str = ""

    @property
    def share(self) -> float:
        return self.error / self.allowed if self.error == self.error else float("inf")


def differences(case: Answered, found: Answer) -> Iterator[Difference]:
    stock, truth = case.stock, case.truth or case.stock
    dtype = stock.keys[0].dtype  # that is computed in; some models widen their logits at the end
    rounding = Rounding(dtype, case.truth is not None)
    least = CHOICE_NOISE if case.chooses_experts and dtype.itemsize == 2 else 0.0
    for label, ours, theirs, true in _rows(case, found, stock, truth):
        yield difference(label, max(least, relative_error(theirs, true)), rounding, ours, theirs, true)
    # One row of logits may be near the truth by luck; the worst of all says how far they usually are.
    noise = max(least, *(relative_error(*pair) for _, *pair in _logits(case, stock, truth)))
    for label, ours, theirs, true in _logits(case, found, stock, truth):
        yield difference(label, noise, rounding, ours, theirs, true)
        yield token_difference(label, noise, rounding, ours, theirs, true)


@dataclass(frozen=True)
class Moved:
    """How far a format of the cache moves the stock model itself, each as a share of the length of a row."""

    rows: float  # of K and V, as they are read back
    logits: float

    def __or__(self, other: Moved) -> Moved:
        return Moved(max(self.rows, other.rows), max(self.logits, other.logits))


def moved(case: Answered, rounded: Answer) -> Moved:
    """``rounded``: what the stock model says over a cache in that format."""
    rows = [relative_error(*pair) for _, *pair in _rows(case, rounded, case.stock)]
    return Moved(max(rows), max(relative_error(*pair) for _, *pair in _logits(case, rounded, case.stock)))


def differences_over(case: Answered, rounded: Answer, found: Answer) -> Iterator[Difference]:
    """The same for a graph whose cache keeps fewer bits, as in ``rounded`` that of the stock model does."""
    exact = {difference.label: difference.allowed for difference in differences(case, case.stock)}

    def over(label: str, noise: float, ours: Tensor, theirs: Tensor) -> Difference:
        error, allowed = relative_error(ours, theirs), exact[label] + BOTH_ROUND * noise
        sentence = f"{label}, differ from the stock model's over a cache in the same format by {error:.1e} of their "
        return Difference(label, error, allowed, f"{sentence}length, and {allowed:.1e} is allowed")

    for label, ours, theirs, stock in _rows(case, found, rounded, case.stock):
        yield over(label, relative_error(theirs, stock), ours, theirs)
    noise = max(relative_error(*pair) for _, *pair in _logits(case, rounded, case.stock))
    for label, ours, theirs in _logits(case, found, rounded):
        yield over(label, noise, ours, theirs)
        yield token_difference(label, noise, Rounding(case.stock.keys[0].dtype), ours, theirs, theirs)


def _rows(case: Answered, *answers: Answer) -> Iterator[tuple[Any, ...]]:
    """The K and the V of each layer, without padding: what it is called, and what each answer has."""
    real = case.scenario.mask[:, case.scenario.start :].bool()
    for layer in range(len(case.stock.keys)):
        for kind, name in (("K", "keys"), ("V", "values")):
            label = f"{kind} of layer {layer}, {case.scenario.name}"
            yield label, *(getattr(answer, name)[layer].transpose(1, 2)[real] for answer in answers)


def _logits(case: Answered, *answers: Answer) -> Iterator[tuple[Any, ...]]:
    """The logits after each feed."""
    scenario = case.scenario
    labels = [f"logits after token {scenario.start + end}, {scenario.name}" for _, end in scenario.feeds]
    yield from zip(labels, *(answer.logits for answer in answers), strict=True)


def difference(label: str, noise: float, rounding: Rounding, ours: Tensor, stock: Tensor, truth: Tensor) -> Difference:
    """``noise`` is how far the stock model is from the truth in numbers of this kind."""
    if not rounding.has_truth:
        error, allowed = relative_error(ours, stock), WITHOUT_TRUTH[rounding.dtype]
    elif noise > PLAUSIBLE[rounding.dtype]:
        error, allowed = relative_error(ours, stock), PLAUSIBLE[rounding.dtype]
    else:
        error, allowed = relative_error(ours, truth), max(FACTOR * noise, FLOOR * rounding.eps)
    sentence = f"{label}, differ from the stock model's by {error:.1e} of their length, and {allowed:.1e} is allowed"
    return Difference(label, error, allowed, sentence)


def token_difference(
    label: str, noise: float, rounding: Rounding, ours: Tensor, stock: Tensor, truth: Tensor
) -> Difference:
    """The greedy token may differ only where the truth has hardly a preference."""
    chosen, wanted = ours.argmax(-1, keepdim=True), stock.argmax(-1, keepdim=True)
    margin = (truth.gather(-1, wanted) - truth.gather(-1, chosen)).abs().double().nan_to_num()
    length = truth.double().nan_to_num().norm(dim=-1, keepdim=True)
    spread = length / truth.shape[-1] ** 0.5  # of one logit, when the error is spread over all of them
    allowed = (TOKEN_FACTOR * max(noise, rounding.eps) * spread).clamp(min=1e-30)
    row = int((margin / allowed).argmax())
    sentence = f"{label}, lead to token {int(chosen[row])} where the stock model says {int(wanted[row])}"
    return Difference(f"greedy token, {label}", float(margin[row]), float(allowed[row]), sentence)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The worst row's difference, as a share of that row's length (or of the mean row's, if longer).

    Row by row, so that one wrong row among many is seen, and by length, so that the rounding of a
    single small entry is not taken for one.
    """
    if wanted.numel() == 0:
        return 0.0
    found, wanted = found.double(), wanted.double()
    if bool((found.isfinite() != wanted.isfinite()).any()):
        return float("inf")
    difference = (found - wanted).nan_to_num().norm(dim=-1)
    length = wanted.nan_to_num().norm(dim=-1)
    return float((difference / length.clamp(min=max(float(length.mean()), 1e-9))).max())
