"""A deeper model takes hardly longer until its first token: layers are traced and compiled once."""

from __future__ import annotations

import pytest
from cold_start import in_a_new_process

#: Eight times the layers may take half as long again.
ALLOWED = 1.5


@pytest.mark.slow
@pytest.mark.timed
def test_depth_costs_little() -> None:
    seconds: dict[int, float] = {}
    for _ in range(5):  # the best of a few, where something else took the machine's time
        for layers in (6, 48):
            found = in_a_new_process(None, layers, "layer", "inductor")["until the first token"]
            seconds[layers] = min(found, seconds.get(layers, found))
        if seconds[48] <= ALLOWED * seconds[6]:
            return
    pytest.fail(f"48 layers take {seconds[48]:.1f} s until the first token, 6 layers {seconds[6]:.1f} s")
