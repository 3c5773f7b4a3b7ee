"""The K and V of some layers lie on disk; what is filled is read before a layer runs, and new rows are stored.

    y = layer_7(x, key_7, value_7)      becomes      wait(layer 7)
                                                     y = layer_7(x, K and V in the slot)
                                                     store the new rows of layer 7
                                                     read layer 11 into the slot

The graph does not change: the buffers of the cache are inputs of its pieces, and a piece is handed a
slot instead. Out go the rows that a step has written and nothing else, in comes what is filled and
nothing behind it. Slots lie still. For contexts whose cache is larger than the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.stream_options import StreamingPass


@dataclass(frozen=True)
class OffloadKV(StreamingPass):
    name = "offload_kv"
    summary = "streams the K and V of layers from disk, for contexts that are larger than the memory"
