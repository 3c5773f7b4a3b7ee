"""What streaming weights came to: a few steps timed, a prediction, and the row of the report."""

from __future__ import annotations

import torch

from fxopt.engine import Engine
from fxopt.offload.measuring import rates
from fxopt.offload.prediction import predict
from fxopt.offload.use import StreamUse
from fxopt.outcome import Outcome, Spot
from fxopt.passes.offload_weights import OffloadWeights
from fxopt.streaming import Streaming

STEPS = 3  # that are timed, after as many that are not


@torch.no_grad()
def timed(streams: Streaming, engine: Engine) -> StreamUse:
    """Decode a few tokens of nothing to see how long the layers compute, and what a step should then take."""
    cache = engine.new_cache(1)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=engine.facts.device)
    ring, counted = streams.ring, dict(engine.stats)
    before = ring.counters
    for turn in range(2 * STEPS):
        if turn == STEPS:
            before = ring.counters
        cache.rewind(0)
        cache.record_mask(None, 1)
        engine.decoding(cache, tokens)(tokens)
    placed, use = streams.use.placement, streams.use
    found = rates(use.bandwidth, len(placed.sizes), before, ring.counters)
    use.predicted = predict(placed.sizes, placed.offloaded, placed.slots, found)
    ring.settle()
    ring.count_anew()
    engine.stats.clear()  # these steps are nobody's
    engine.stats.update(counted)
    return use


def streams_outcome(rewriter: OffloadWeights, use: StreamUse | None) -> Outcome:
    """A place for every layer that is streamed."""
    found = Outcome(rewriter.name, rewriter.stage.value, rewriter.summary)
    if use is not None:
        found.sites = [Spot(f"layer {layer}", "", layer) for layer in use.placement.offloaded]
    found.matched = found.expected = len(found.sites)
    return found
