"""Problems for tests of the planner: random ones, hard ones, and those of a language model's graph."""

from __future__ import annotations

import random
from itertools import permutations

from fxopt.memory import Buffer, Problem


def random_problem(seed: int, count: int, *, steps: int = 12, aligns: tuple[int, ...] = (1,)) -> Problem:
    """Lifetimes and sizes of any kind, some of them zero."""
    rng = random.Random(seed)
    buffers = []
    for number in range(count):
        start = rng.randrange(steps)
        end = min(steps, start + rng.randint(1, max(1, steps // 2))) if rng.random() < 0.8 else start + 1
        nbytes = 0 if rng.random() < 0.05 else rng.randint(1, 9) * rng.choice((1, 1, 4))
        buffers.append(Buffer(f"b{number}", start, end, nbytes, rng.choice(aligns), padded=rng.random() < 0.5))
    return Problem(buffers)


def cut_problem(seed: int, pieces: int, *, capacity: int = 1024, steps: int = 400) -> Problem:
    """A full rectangle of time and bytes in pieces: they fit again at ``capacity``, and only if nothing is wasted."""
    rng = random.Random(seed)
    rectangles = [(0, steps, 0, capacity)]
    while len(rectangles) < pieces:
        areas = [(right - left) * (top - bottom) for left, right, bottom, top in rectangles]
        left, right, bottom, top = rectangles.pop(rng.choices(range(len(areas)), areas)[0])
        if rng.random() < 0.5 and right - left > 1:
            middle = rng.randint(left + 1, right - 1)
            rectangles += [(left, middle, bottom, top), (middle, right, bottom, top)]
        elif top - bottom > 1:
            middle = rng.randint(bottom + 1, top - 1)
            rectangles += [(left, right, bottom, middle), (left, right, middle, top)]
        else:
            rectangles.append((left, right, bottom, top))
    rng.shuffle(rectangles)
    return Problem(
        Buffer(f"b{number}", left, right, top - bottom, 1)
        for number, (left, right, bottom, top) in enumerate(rectangles)
    )


def chain_problem(layers: int, *, tokens: int, past: int = 0, seed: int = 0) -> Problem:
    """What a decoder's graph looks like: layer after layer of the same lifetimes, and a few values for all of them."""
    rng = random.Random(seed)
    hidden, wide, heads, small = 576 * 4 * tokens, 1536 * 4 * tokens, 9 * 4 * tokens * (tokens + past), 4 * tokens
    pattern = [
        (start, start + rng.choice((2, 2, 2, 3, 5, 10)), rng.choice((hidden, hidden, hidden, wide, heads, small, 0)))
        for start in range(1, 34)
    ]
    length = 35
    end = layers * length
    buffers = [Buffer("mask", 0, end, 4 * tokens * (tokens + past)), Buffer("rotary", 1, end, 64 * 4 * tokens)]
    for layer in range(layers):
        base = layer * length
        buffers += [
            Buffer(f"first{layer}", base, base + 20, hidden),
            Buffer(f"second{layer}", base + 19, base + 36, hidden),
        ]
        buffers += [Buffer(f"v{layer}_{n}", base + a, base + b, size) for n, (a, b, size) in enumerate(pattern)]
    return Problem(buffers)


def least_arena(problem: Problem) -> int:
    """The smallest arena, by trying every order in which buffers can be piled up."""
    best = problem.naive + sum(buffer.align for buffer in problem.buffers)
    for order in permutations(buffer for buffer in problem.buffers if buffer.size):
        tops: list[tuple[Buffer, int]] = []
        for buffer in order:
            under = [top for other, top in tops if other.start < buffer.end and buffer.start < other.end]
            offset = -(-max(under, default=0) // buffer.align) * buffer.align
            tops.append((buffer, offset + buffer.size))
        best = min(best, max((top for _, top in tops), default=0))
    return best
