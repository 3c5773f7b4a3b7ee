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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxopt.artifact.keys import Recipe
from fxopt.artifact.saving import save
from fxopt.cache import BufferCache
from fxopt.decode_loop import decode, obstacle
from fxopt.engine import Engine
from fxopt.errors import InvalidRequestError
from fxopt.program import Program
from fxopt.report import Report
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
        self.report = report
        self._model = model
        self._symbolic = symbolic
        self._recipe = recipe
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.watch = WeightWatch(model)
        self.depth = _depth(model.config)

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
        return self.engine.stats

    @property
    def kv_bytes(self) -> int:
        """Memory held in cache buffers, in use or waiting for the next call."""
        return self.engine.pool.nbytes

    def release(self) -> int:
        """Give back the memory of buffers that no cache is using; returns the bytes. The next call allocates anew."""
        return self.engine.pool.release()


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


def _depth(config: Any) -> Any:
    """How many layers run; a model that drafts for itself runs the first few for a while."""
    return getattr(config, "num_hidden_layers", None)


@dataclass(frozen=True)
class _Request:
    """One call of forward that the graphs serve."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: BufferCache | None
    keep: int | Tensor
    return_dict: bool


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
        request = _request(self, args, kwargs)
        if isinstance(request, str):
            engine.count(f"eager: {request}")
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        batch, tokens = request.input_ids.shape
        _check_batch(engine, batch)
        cache = request.cache if request.cache is not None else engine.new_cache(batch)
        if cache.length + tokens > engine.facts.max_len:
            raise InvalidRequestError(
                f"the cache holds {cache.length} tokens and {tokens} more were fed, but max_len is "
                f"{engine.facts.max_len}; call fxopt.optimize with a larger max_len"
            )
        if cache.length == 0:
            self.fxopt.watch.check()
        cache.record_mask(request.attention_mask, tokens)
        positions = request.position_ids
        if positions is None:
            positions = torch.arange(cache.length, cache.length + tokens, device=engine.facts.device)[None]
        positions = positions.expand(batch, tokens)
        before = cache.length
        try:
            logits = engine.step(cache, request.input_ids, positions, keep=_kept(request.keep, tokens))
        except BaseException:
            cache.rewind(before)  # Ctrl-C between two chunks must not leave half a prompt
            raise
        if isinstance(request.keep, Tensor):
            logits = logits[:, request.keep]
        if not request.return_dict:
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
            or generation_config.cache_implementation not in _OURS
            or self.fxopt.depth != _depth(self.config)  # a draft that leaves early
        ):
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        _check_batch(self.fxopt.engine, batch_size * copies)
        model_kwargs["past_key_values"] = self.fxopt.engine.new_cache(batch_size * copies)
        return None


def _kept(keep: int | Tensor, tokens: int) -> int:
    """For how many tokens, counted from the last, logits are needed; 0 asks for all."""
    return keep if isinstance(keep, int) and 0 < keep < tokens else tokens


def _check_batch(engine: Engine, batch: int) -> None:
    limit = engine.limits.max_batch
    if limit is not None and batch > limit:
        raise InvalidRequestError(
            f"a batch of {batch} sequences was given, but max_batch is {limit}; "
            "split the batch or call fxopt.optimize with a larger max_batch"
        )


#: Caches by name that ours stands for; another one asked for is another one got.
_OURS = (None, "static", "hybrid", "sliding_window", "hybrid_chunked")

_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")

#: Arguments of forward that ask for something the graphs compute.
_SERVED = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "cache_position",
    "tokenizer",  # of stop strings; generate hands it on, and forward has no use for it
}


def _request(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Request | str:
    """What a call asks for, or the reason why only the eager model can serve it."""
    given = dict(zip(model.fxopt.parameters, args, strict=False)) | kwargs
    obstacle = _obstacle_in_model(model) or _obstacle_in_options(model, given) or _obstacle_in_inputs(model, given)
    if obstacle is not None:
        return obstacle
    input_ids, cache = given["input_ids"], given.get("past_key_values")
    if cache is not None and cache.batch != input_ids.shape[0]:
        raise InvalidRequestError(
            f"a batch of {input_ids.shape[0]} was given with a cache for {cache.batch}; use a cache of its own"
        )
    return_dict, keep = given.get("return_dict"), given.get("logits_to_keep")
    return _Request(
        input_ids,
        given.get("attention_mask"),
        given.get("position_ids"),
        cache,
        0 if keep is None else keep,
        model.config.return_dict if return_dict is None else return_dict,
    )


def _obstacle_in_model(model: Any) -> str | None:
    config = model.config
    if model.training:
        return "training mode"
    if torch.is_autocast_enabled(model.fxopt.engine.facts.device.type):
        return "autocast is on"
    if outputs := [name for name in _EXTRA_OUTPUTS if getattr(config, name, False)]:
        return f"the config asks for {', '.join(outputs)}"
    if model.fxopt.depth != _depth(config):
        return "other layers than were captured"
    return None


def _obstacle_in_options(model: Any, given: dict[str, Any]) -> str | None:
    if extra := {name for name, value in given.items() if value is not None and value is not False} - _SERVED:
        return f"{', '.join(sorted(extra))} given"
    use_cache, cache = given.get("use_cache"), given.get("past_key_values")
    if not (model.config.use_cache if use_cache is None else use_cache):
        return "use_cache=False"
    if cache is not None and not (isinstance(cache, BufferCache) and cache.pool is model.fxopt.engine.pool):
        return f"a foreign cache ({type(cache).__name__})"
    return None


def _obstacle_in_inputs(model: Any, given: dict[str, Any]) -> str | None:
    facts, cache = model.fxopt.engine.facts, given.get("past_key_values")
    input_ids, mask, positions = given.get("input_ids"), given.get("attention_mask"), given.get("position_ids")
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        return "no input_ids of shape [batch, tokens]"
    if input_ids.device != facts.device:
        raise InvalidRequestError(
            f"input_ids is on {input_ids.device} but the model is on {facts.device}; move the inputs"
        )
    if cache is None and input_ids.shape[1] > facts.max_len:
        return "more tokens than max_len without a cache of ours"
    filled = cache.length if cache is not None else 0
    if mask is not None and tuple(mask.shape) != (input_ids.shape[0], filled + input_ids.shape[1]):
        return "an attention mask that is not [batch, past + tokens]"
    shapes = {(1, input_ids.shape[1]), tuple(input_ids.shape)}
    if positions is not None and tuple(positions.shape) not in shapes:
        return "positions that are not [batch, tokens]"
    if "position_ids" in model.fxopt.parameters and positions is None and mask is not None and not bool(mask.all()):
        return "a padded batch without position_ids, whose positions only the model's own code knows"
    return None
