"""What streaming came to: a few steps timed, a prediction, and the rows of the report."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.cache import BufferCache
from fxopt.engine import Engine
from fxopt.listing import Listing
from fxopt.offload.measuring import rates
from fxopt.offload.prediction import predict
from fxopt.offload.ring import Ring
from fxopt.offload.tally import Counters
from fxopt.offload.use import CacheUse, StreamUse, WeightUse
from fxopt.outcome import Outcome, Spot
from fxopt.row_streams import RowStreams
from fxopt.stream_listing import with_streams
from fxopt.stream_options import StreamingPass
from fxopt.streaming import WeightStreams

MOST_WRITTEN = 256 << 20  # bytes of a cache, to time how they are read
STEPS = 3  # that are timed, after as many that are not


def note_weights(streams: WeightStreams, engine: Engine, context: int) -> WeightUse:
    """What a step that streams weights should take."""
    placed, use = streams.use.placement, streams.use
    context = use.context = _affordable(engine, context)
    before, after = _timed(engine, engine.new_cache(1), streams.ring, context)
    found = rates(use.bandwidth, len(placed.sizes), before, after)
    use.predicted = predict(placed.sizes, placed.offloaded, placed.slots, found)
    return use


def note_rows(rows: RowStreams, engine: Engine, context: int) -> CacheUse:
    """What a step that streams the cache of one sequence should take, with up to ``context`` rows filled."""
    placed, context = rows.placed(1), _affordable(engine, context)
    use = CacheUse(
        placement=placed,
        store=rows.kind,
        device=str(engine.facts.device),
        context=context,
        row_bytes=sum(map(rows.row_bytes, placed.offloaded)),
    )
    if not placed.offloaded:
        return use
    cache = engine.new_cache(1)
    assert cache.away is not None
    before, after = _timed(engine, cache, cache.away.ring, context)
    use.bandwidth = (after.nbytes - before.nbytes) / max(1e-9, after.reading - before.reading)
    sizes = [context * rows.row_bytes(layer) for layer in range(len(placed.sizes))]
    found = rates(use.bandwidth, len(sizes), before, after)
    use.predicted = predict(sizes, placed.offloaded, placed.slots, found)
    return use


def _affordable(engine: Engine, context: int) -> int:
    """As many rows, unless too much would have to be written for them."""
    rows = engine.row_streams
    nbytes = sum(map(rows.row_bytes, rows.placed(1).offloaded)) if rows is not None else 0
    return max(1, min(context, MOST_WRITTEN // nbytes)) if nbytes else context


@torch.no_grad()
def _timed(engine: Engine, cache: BufferCache, ring: Ring, context: int) -> tuple[Counters, Counters]:
    """Decode a few tokens of nothing behind ``context`` rows of nothing: what the ring had counted before and after."""
    counted = dict(engine.stats)
    cache.pretend(context)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=engine.facts.device)
    before = ring.tally.counters
    for turn in range(2 * STEPS):
        if turn == STEPS:
            ring.settle()
            before = ring.tally.counters
        cache.rewind(context)
        cache.record_mask(None, 1)
        engine.decoding(cache, tokens)(tokens)
    ring.settle()
    after = ring.tally.counters
    engine.stats.clear()  # these steps are nobody's
    engine.stats.update(counted)
    return before, after


def forget_timed(engine: Engine) -> None:
    """Count from here on: what was timed was nobody's."""
    if engine.weight_ring is not None:
        engine.weight_ring.tally.begin_anew()
    if engine.row_streams is not None:
        engine.row_streams.tally.begin_anew()


def stream_outcome(rewriter: StreamingPass, use: StreamUse | None, graph: Callable[[], Listing]) -> Outcome:
    """A place for every layer that is streamed, and ``graph`` with what is done there."""
    found = Outcome(rewriter.name, rewriter.stage.value, rewriter.summary)
    if use is not None:
        placed, is_cache = use.placement, isinstance(use, CacheUse)
        found.sites = [Spot(f"layer {layer}", "", layer) for layer in placed.offloaded]
        what = "rows" if is_cache else "weights"
        found.show_when_read(lambda: with_streams(graph(), placed, what, rewriter.name, stores=is_cache), lambda: None)
    found.matched = found.expected = len(found.sites)
    return found
