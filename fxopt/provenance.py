"""Our passes as PyTorch's own tools see them: logs, traces, node histories and the off switch.

``TORCH_LOGS="+fxopt"`` shows the log, ``TORCH_TRACE=folder`` with tlparse the graph after each
pass, ``TORCHINDUCTOR_DISABLED_PASSES=fuse_qkv`` leaves a pass out, and with provenance tracking on
(``TORCH_COMPILE_DEBUG`` or ``INDUCTOR_PROVENANCE``) every node says in ``meta["from_node"]`` which
pass made it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch._logging._internal import trace_structured
from torch.fx import GraphModule
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

log = logging.getLogger("fxopt")

SWITCH = "TORCHINDUCTOR_DISABLED_PASSES"


def observed(gm: GraphModule, name: str) -> AbstractContextManager[object]:
    """Record in ``from_node`` what happens to the nodes of ``gm``, if provenance tracking is on."""
    return GraphTransformObserver(gm, name, subsystem="fxopt")


def is_switched_off(name: str) -> bool:
    """Whether PyTorch's list of disabled passes holds this one."""
    from torch._inductor import config

    listed = str(getattr(config, "disabled_passes", "")).replace(";", ",").split(",")
    return name.upper() in (entry.strip().upper() for entry in listed)


def trace(name: str, text: Callable[[], str]) -> None:
    """Write a text to PyTorch's structured trace; ``text`` is called only if there is one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"fxopt_{name}", "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )
