"""Decode steps recorded once as a CUDA graph and replayed: one launch instead of hundreds.

A recording reads and writes fixed addresses. All of them are the buffers of one cache, the small
tensors that change from turn to turn and lie beside them, and the weights; so there is one
recording per buffer set, batch and window, kept with the buffers and gone with them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fxopt.errors import first_line

log = logging.getLogger("fxopt")

Run = Callable[[], Tensor]
Record = Callable[[Run], Run]

WARM_UPS = 2  # runs before a recording: libraries allocate their workspaces in the first


class Replays:
    """Steps bound to their buffers, recorded on devices that can."""

    def __init__(self, device: torch.device, record: Record | None = None) -> None:
        self._record = record if record is not None else _recorder(device)
        self._lock = threading.RLock()

    def of(self, key: Hashable, known: dict[Hashable, Run], bind: Callable[[], Run], *, record: bool = True) -> Run:
        """The step that ``known`` keeps under ``key``; else what ``bind`` makes, recorded if that can be done.

        Without ``record`` it is launched anew each time.
        """
        run = known.get(key)
        if run is None:
            with self._lock:  # two recordings at once would see each other's launches
                run = known[key] = self._recorded(bind()) if record else bind()
        return run

    def _recorded(self, step: Run) -> Run:
        if self._record is None:
            return step
        try:
            replay = self._record(step)
        except RuntimeError as error:  # an op that waits for the device, or memory
            log.warning("a decode step cannot be recorded and runs launch by launch: %s", first_line(error))
            return step
        return lambda: replay().clone()  # where the result lies the next replay writes its own


def _recorder(device: torch.device) -> Record | None:
    return record_cuda if device.type == "cuda" else None


def record_cuda(step: Run) -> Run:
    """Record ``step`` on a stream of its own; the warm-up runs write the row that the replay will write again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
