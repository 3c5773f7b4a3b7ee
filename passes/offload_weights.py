"""The weights of some layers lie on disk, and are read while earlier layers run.

    y = layer_7(x)      becomes      wait(layer 7)
                                     y = layer_7(x, weights in the slot)
                                     read layer 11 into the slot

Layers that stay and layers that are streamed alternate as evenly as the budget allows. What is
streamed goes through a ring of slots; the order of layers is known, and goes on with the first ones
while the head of the model runs. The graph does not change: weights are inputs of its pieces, and a
piece is handed a slot instead. It makes nothing faster. A model runs that is larger than the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.stream_options import StreamingPass


@dataclass(frozen=True)
class OffloadWeights(StreamingPass):
    name = "offload_weights"
    summary = "streams the weights of layers from disk, for models that are larger than the memory"
