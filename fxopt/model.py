"""The object that ``optimize`` hands out: the user's model class, with forward on compiled graphs.

It is an instance of a subclass of the model's own class and shares its modules, so ``generate``,
``pipeline``, ``state_dict``, ``save_pretrained`` and ``isinstance`` work as before. Calls that the
graphs do not serve run the untouched eager code, and are counted in ``fast.fxopt.stats``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxopt.artifact.keys import Recipe
from fxopt.artifact.saving import save
from fxopt.call import depth_of, read_call
from fxopt.decode_loop import decode, obstacle
from fxopt.engine import Engine
from fxopt.errors import ArtifactError, InvalidRequestError
from fxopt.offload.tally import Counters
from fxopt.program import Program
from fxopt.report import Report
from fxopt.rounded_weights import own_name
from fxopt.stream_options import StreamingPass
from fxopt.weights import WeightWatch

Model = TypeVar("Model", bound=PreTrainedModel)


class Handle:
    """``fast.fxopt``: the report, the graphs and the counters of one optimised model."""

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        symbolic: Callable[[], Program],
        report: Report,
        recipe: Recipe,
    ) -> None:
        self.engine = engine
        self._report = report
        self._model = model
        self._symbolic = symbolic
        self._recipe = recipe
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        rounded = [own_name(name) for coded in engine.facts.weights for name in coded.of]
        self.watch = WeightWatch(model, rounded)
        self.depth = depth_of(model.config)

    @property
    def report(self) -> Report:
        """What was rewritten and why; where layers are streamed, also what that has cost so far."""
        ring, rows = self.engine.weight_ring, self.engine.row_streams
        if ring is not None and self._report.streamed_weights is not None:
            self._report.streamed_weights.measured = ring.tally.kinds
        if rows is not None and self._report.streamed_cache is not None:
            self._report.streamed_cache.measured = rows.tally.kinds
        return self._report

    @property
    def symbolic(self) -> Program:
        """The rewritten graph for any batch and any number of new tokens."""
        return self._symbolic()

    def save(self, folder: str | Path) -> None:
        """Write graphs, report and compiled code to a folder, for ``fxopt.load`` in another process.

        Weights are not in it. A model that was saved there before is replaced in one go.
        """
        if not isinstance(folder, str | os.PathLike):
            raise InvalidRequestError(f"folder={folder!r} is no path; give a folder to save to")
        self.watch.check()
        if streaming := [one.name for one in self._recipe.passes if isinstance(one, StreamingPass)]:
            raise ArtifactError(f"a model that streams layers cannot be saved yet; leave {' and '.join(streaming)} out")
        save(Path(folder), self._model, self.engine, self.symbolic, self.report, self._recipe)

    @property
    def graphs(self) -> dict[str, GraphModule]:
        """The rewritten graphs: the symbolic one, and those that run at batch size 1 or ``max_batch``."""
        batch = self.engine.limits.max_batch or 1
        return {
            "symbolic": self.symbolic.gm,
            "prefill": self.engine.lowered(self.engine.prefill_role(batch)).program.gm,
            "decode": self.engine.lowered(self.engine.decode_role(batch)).program.gm,
        }

    @property
    def stats(self) -> Counter[str]:
        """How many steps ran on which graph, and how many on the eager model and why."""
        ring, rows = self.engine.weight_ring, self.engine.row_streams
        if ring is not None:
            self._take_note(_counted(ring.tally.counters, "weight", "layers"))
        if rows is not None:
            self._take_note(_counted(rows.tally.counters, "cache", "caches of layers"))
        return self.engine.stats

    def _take_note(self, counted: Counter[str]) -> None:
        for name, number in counted.items():
            self.engine.stats[name] = number

    @property
    def kv_bytes(self) -> int:
        """Memory held in cache buffers, in use or waiting for the next call."""
        return self.engine.pool.nbytes

    @property
    def arena_bytes(self) -> int:
        """Memory that this thread has computed in, where ``plan_memory`` has placed what compiled code keeps."""
        return self.engine.arena.nbytes if self.engine.arena is not None else 0

    def release(self) -> int:
        """Give back the memory of buffers that no cache is using, and of this thread's arena; returns the bytes.

        The next call allocates anew.
        """
        arena = self.engine.arena
        return self.engine.pool.release() + (arena.release() if arena is not None else 0)


def make_fast(model: Model, engine: Engine, symbolic: Callable[[], Program], report: Report, recipe: Recipe) -> Model:
    """A second face of ``model``: same modules and weights, forward through ``engine``."""
    stock_class = type(model)
    fast_class: Any = type(stock_class.__name__, (FastModel, stock_class), {"__module__": stock_class.__module__})

    # ``generate`` reads the signature of forward to learn which inputs the model takes.
    @functools.wraps(stock_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FastModel.forward(self, *args, **kwargs)

    fast_class.forward = forward
    fast = fast_class.__new__(fast_class)
    fast.__dict__.update({name: _own(value) for name, value in model.__dict__.items()})
    fast.generation_config = copy.deepcopy(model.generation_config)
    fast.fxopt = Handle(model, engine, symbolic, report, recipe)
    return cast(Model, fast)


def _own(value: Any) -> Any:
    """Containers are copied, so that registering a hook or a module on one face leaves the other alone."""
    return value.copy() if isinstance(value, (dict, set)) else value


class FastModel:
    """Mixed in front of a causal LM's class."""

    fxopt: Handle
    config: Any
    training: bool

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise InvalidRequestError(
            "an optimised model cannot be copied or pickled: its compiled code and buffers belong to this process. "
            "Copy or save the stock model, and optimise the copy"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine = self.fxopt.engine
        call = read_call(self, args, kwargs)
        if isinstance(call, str):
            engine.count(f"eager: {call}")
            _check_whole(self, engine, call)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        batch, tokens = call.input_ids.shape
        _check_batch(engine, batch)
        cache = call.cache if call.cache is not None else engine.new_cache(batch)
        if cache.length + tokens > engine.facts.max_len:
            raise InvalidRequestError(
                f"the cache holds {cache.length} tokens and {tokens} more were fed, but max_len is "
                f"{engine.facts.max_len}; call fxopt.optimize with a larger max_len"
            )
        if cache.length == 0:
            self.fxopt.watch.check()
        cache.record_mask(call.attention_mask, tokens)
        positions = call.position_ids
        if positions is None:
            positions = torch.arange(cache.length, cache.length + tokens, device=engine.facts.device)[None]
        positions = positions.expand(batch, tokens)
        before = cache.length
        try:
            logits = engine.step(cache, call.input_ids, positions, keep=_kept(call.keep, tokens))
        except BaseException:
            cache.rewind(before)  # Ctrl-C between two chunks must not leave half a prompt
            raise
        if isinstance(call.keep, Tensor):
            logits = logits[:, call.keep]
        if not call.return_dict:
            return logits, cache
        return engine.facts.output_class(logits=logits, past_key_values=cache)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        engine = self.fxopt.engine
        why = obstacle(self, stopping_criteria, generation_config, model_kwargs, synced_gpus)
        if why is None:
            engine.count("loop: fast")
            return decode(
                self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
        engine.count(f"loop: Transformers' own, because {why}")
        return super()._sample(  # type: ignore[misc]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        config = super()._prepare_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]
        engine = self.fxopt.engine
        prompt = kwargs.get("input_ids_length", args[3] if len(args) > 3 else 0)
        if config.max_length > engine.facts.max_len and config.use_cache:
            raise InvalidRequestError(
                f"a prompt of {prompt} tokens and {config.max_length - prompt} new ones make {config.max_length}, but "
                f"max_len is {engine.facts.max_len}; ask for fewer tokens or call fxopt.optimize with a larger max_len"
            )
        return config

    def _served_caches(self) -> tuple[str | None, ...]:
        return _OURS if self.fxopt.engine.row_streams is None else (*_OURS, *_OURS_AWAY)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if (
            model_kwargs.get("past_key_values") is not None
            or not generation_config.use_cache
            or generation_config.output_attentions  # eager, and shaped by the cache of the model's own
            or generation_config.cache_implementation not in self._served_caches()
            or self.fxopt.depth != depth_of(self.config)  # a draft that leaves early
        ):
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        _check_batch(self.fxopt.engine, batch_size * copies)
        model_kwargs["past_key_values"] = self.fxopt.engine.new_cache(batch_size * copies)
        return None


def _counted(found: Counters, what: str, layers: str) -> Counter[str]:
    """What streaming weights or the cache has come to, for ``stats``."""
    return Counter(
        {
            f"{layers} read": found.reads,
            f"{layers} waited for": found.waits,
            f"{what} bytes read": found.nbytes,
            f"{what} bytes stored": found.stored,
            f"milliseconds waited for {layers}": int(1000 * found.exposed),
        }
    )


def _kept(keep: int | Tensor, tokens: int) -> int:
    """For how many tokens, counted from the last, logits are needed; 0 asks for all."""
    return keep if isinstance(keep, int) and 0 < keep < tokens else tokens


def _check_whole(model: Any, engine: Engine, call: str) -> None:
    """Raise a sentence if the model's own code cannot run: streamed weights of a device lie on the host."""
    if engine.weight_ring is None or all(one.device == engine.facts.device for one in model.parameters()):
        return
    raise InvalidRequestError(
        f"this call needs the model's own code ({call}), which cannot run: with offload_weights on "
        f"{engine.facts.device} the weights of streamed layers are on the host. Call what the graphs serve, or load "
        "the model a second time for such calls"
    )


def _check_batch(engine: Engine, batch: int) -> None:
    limit = engine.limits.max_batch
    if limit is not None and batch > limit:
        raise InvalidRequestError(
            f"a batch of {batch} sequences was given, but max_batch is {limit}; "
            "split the batch or call fxopt.optimize with a larger max_batch"
        )


#: Caches by name that ours stands for; another one asked for is another one got.
_OURS = (None, "static", "hybrid", "sliding_window", "hybrid_chunked")
_OURS_AWAY = ("offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked")  # with offload_kv
