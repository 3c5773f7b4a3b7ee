"""Ways to use a model that end in what a user would look at, for the stock model and the optimised one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from words import word_tokenizer

from fxopt.errors import first_line
from fxopt.families import SLIDING, VOCABULARY, tiny

MAX_LEN = 96
CHUNK = 16
PROMPT = 9
NEW = 20
assert PROMPT + NEW > SLIDING  # so that answers leave the sliding windows behind


def prompts(rows: int, tokens: int, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


IDS = prompts(2, PROMPT)
MASK = torch.ones_like(IDS)
LEFT, RIGHT = MASK.clone(), MASK.clone()
LEFT[1, :4] = 0
RIGHT[1, -4:] = 0

ONE = {"input_ids": IDS[:1]}
TWO = {"input_ids": IDS}
PADDED = {"input_ids": IDS * LEFT, "attention_mask": LEFT}
PADDED_RIGHT = {"input_ids": IDS * RIGHT, "attention_mask": RIGHT}
LONG = {"input_ids": prompts(2, 2 * CHUNK + 7)}
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WITH_CACHE: dict[str, Any] = {"return_dict_in_generate": True}


@dataclass(frozen=True)
class Side:
    """The stock model or the optimised one, with what a mode may need besides."""

    model: Any
    draft: Any  # a stock model that often guesses right
    own_draft: Any  # the same, optimised when the model is
    greedy: list[list[int]]  # what the stock model says to TWO


@dataclass(frozen=True)
class Answer:
    """What a user sees: ``exact`` is equal or wrong, ``close`` may differ by rounding."""

    exact: Any
    close: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, *outputs: Any) -> Answer:
        """From what ``generate`` or forward gave back; of a cache, its length."""
        parts = [dict(output) if isinstance(output, dict) else output for output in outputs]
        leaves = tree_leaves(parts, is_leaf=lambda part: isinstance(part, Cache))
        seen = [torch.tensor(int(leaf.get_seq_length())) if isinstance(leaf, Cache) else leaf for leaf in leaves]
        return cls(
            [leaf.tolist() for leaf in seen if not leaf.is_floating_point()],
            tuple(leaf for leaf in seen if leaf.is_floating_point()),
        )


Play = Callable[[Side], Answer]


@dataclass(frozen=True)
class Mode:
    """``bites``: the answer is not the plain greedy one, or the mode tests nothing. ``eager``: what the model's
    own code serves, and how many steps of it. ``unless``: families in which the stock model itself fails,
    and ``since``: the Transformers in which it does not."""

    play: Play
    bites: bool = False
    eager: Mapping[str, int] = field(default_factory=dict)
    unless: Mapping[str, str] = field(default_factory=dict)
    since: str = "5"


@dataclass(frozen=True)
class Said:
    """The token that greedy decoding says in a row at a step, so that an option bites in every family."""

    row: int
    step: int

    def of(self, side: Side) -> int:
        return side.greedy[self.row][PROMPT + self.step]


@dataclass(frozen=True)
class Its:
    """A part of the side that plays."""

    name: str

    def of(self, side: Side) -> Any:
        return getattr(side, self.name)


class Forbid(LogitsProcessor):
    """Never the tokens below 64."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, :64] = -float("inf")
        return scores


class AfterSixteen(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 16, device=input_ids.device)


WORDS = word_tokenizer()
TEXTS = [" ".join(f"w{i}" for i in row) for row in (range(20, 29), range(50, 54), range(90, 97))]


# Ways to play. Most modes are one call of ``generate`` with options.


def call(prompt: Mapping[str, Tensor] = TWO, **options: Any) -> Play:
    def play(side: Side) -> Answer:
        return Answer.of(side.model.generate(**prompt, **GREEDY | _filled_in(options, side)))

    return play


def _filled_in(options: dict[str, Any], side: Side) -> Any:
    return tree_map(lambda leaf: leaf.of(side) if isinstance(leaf, (Said, Its)) else leaf, options)


def streamed(side: Side) -> Answer:
    pieces: list[str] = []

    class Keep(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    output = side.model.generate(**ONE, **GREEDY, streamer=Keep(WORDS))
    assert len(pieces) > NEW / 2
    return Answer((output.tolist(), pieces))


def streamed_from_a_thread(side: Side) -> Answer:
    streamer = TextIteratorStreamer(WORDS, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=side.model.generate, kwargs={**ONE, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    return Answer(pieces)


def until_a_word(side: Side) -> Answer:
    word = WORDS.decode([Said(0, 4).of(side)])
    return Answer.of(side.model.generate(**ONE, **GREEDY, stop_strings=[word], tokenizer=WORDS))


def by_config(side: Side) -> Answer:
    config = GenerationConfig(max_new_tokens=7, num_beams=3, length_penalty=0.5, pad_token_id=0)
    return Answer.of(side.model.generate(**TWO, generation_config=config))


def one_row_ends_early(side: Side) -> Answer:
    eos = next(token for token in side.greedy[0][PROMPT + 2 :] if token not in side.greedy[1][PROMPT:])
    rows = side.model.generate(**TWO, **GREEDY | {"pad_token_id": 1}, eos_token_id=eos)
    assert rows[0, -1] == 1
    assert eos not in rows[1]
    return Answer.of(rows)


def three_turns(prompt: Mapping[str, Tensor], **options: Any) -> Play:
    """A chat: each turn adds tokens to the conversation and hands the cache on."""

    def play(side: Side) -> Answer:
        found = _filled_in(options, side)
        turns, cache = [], None
        dialogue, mask = prompt["input_ids"], prompt.get("attention_mask", torch.ones_like(prompt["input_ids"]))
        for turn in range(3):
            out = side.model.generate(
                dialogue,
                attention_mask=mask,
                past_key_values=cache,
                **GREEDY | WITH_CACHE | {"max_new_tokens": 6} | found,
            )
            turns.append(Answer.of(out).exact)
            said = prompts(len(dialogue), 3 + turn)
            dialogue, cache = torch.cat([out.sequences, said], dim=1), out.past_key_values
            mask = torch.nn.functional.pad(mask, (0, dialogue.shape[1] - mask.shape[1]), value=1)
        return Answer(turns)

    return play


def early_exit(**options: Any) -> Play:
    """Transformers sets ``config.num_hidden_layers`` while it drafts, and leaves it so if anything fails."""

    def play(side: Side) -> Answer:
        layers = side.model.config.num_hidden_layers
        try:
            return call(ONE, assistant_early_exit=1, **options)(side)
        finally:
            side.model.config.num_hidden_layers = layers

    return play


def crop_and_go_on(side: Side) -> Answer:
    out = side.model.generate(**ONE, **GREEDY | {"max_new_tokens": 8}, **WITH_CACHE)
    out.past_key_values.crop(-5)
    other = torch.cat([out.sequences[:, :-6], prompts(1, 4)], dim=1)
    return Answer.of(side.model.generate(other, past_key_values=out.past_key_values, **GREEDY))


def another_call_in_between(side: Side) -> Answer:
    first = side.model.generate(**TWO, **GREEDY | {"max_new_tokens": 6}, **WITH_CACHE)
    between = side.model.generate(**PADDED, **GREEDY)
    longer = torch.cat([first.sequences, IDS], dim=1)
    return Answer.of(between, side.model.generate(longer, past_key_values=first.past_key_values, **GREEDY))


def two_answers_from_one_prompt(side: Side) -> Answer:
    """The cache of a system prompt is copied for each question."""
    system = side.model(**TWO, use_cache=True).past_key_values
    questions = [torch.cat([IDS, prompts(2, 3 + i)], dim=1) for i in range(2)]
    return Answer.of(*(side.model.generate(q, past_key_values=copy.deepcopy(system), **GREEDY) for q in questions))


def a_cache_that_was_reset(side: Side) -> Answer:
    cache = side.model.generate(**TWO, **GREEDY, **WITH_CACHE).past_key_values
    cache.reset()
    return Answer.of(side.model.generate(**PADDED, **GREEDY, past_key_values=cache))


def after_an_interrupt(side: Side) -> Answer:
    class Impatient(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 16:
                raise KeyboardInterrupt
            return scores

    with pytest.raises(KeyboardInterrupt):
        side.model.generate(**TWO, **GREEDY, logits_processor=[Impatient()])
    return Answer.of(side.model.generate(**TWO, **GREEDY))


def piped(texts: Any, **options: Any) -> Play:
    def play(side: Side) -> Answer:
        pipe = pipeline("text-generation", model=side.model, tokenizer=WORDS, device="cpu")
        return Answer(pipe(texts, **GREEDY, **options))

    return play


def embeddings(side: Side) -> Answer:
    return Answer.of(side.model.generate(inputs_embeds=side.model.get_input_embeddings()(IDS), **GREEDY))


def attentions(side: Side) -> Answer:
    """Only the eager attention hands out its weights."""
    before = side.model.config._attn_implementation
    side.model.set_attn_implementation("eager")
    try:
        return Answer.of(side.model.generate(**TWO, **GREEDY, **WITH_CACHE, output_attentions=True))
    finally:
        side.model.set_attn_implementation(before)


def in_training(side: Side) -> Answer:
    side.model.train()
    try:
        return Answer.of(side.model.generate(**TWO, **GREEDY))
    finally:
        side.model.eval()


def with_cache(make: Callable[[Any], Any]) -> Play:
    """A cache that the user brings."""

    def play(side: Side) -> Answer:
        return Answer.of(side.model.generate(**TWO, **GREEDY, past_key_values=make(side.model.config)))

    return play


def forward(**options: Any) -> Play:
    def play(side: Side) -> Answer:
        return Answer.of(side.model(**TWO, **options))

    return play


def own_loop(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **kwargs: Any) -> Tensor:
    """A decoding loop of the user's: the second best token each time."""
    cache, fed = kwargs["past_key_values"], input_ids
    for _ in range(NEW):
        logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        fed = logits_processor(input_ids, logits).topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, fed], dim=1)
    return input_ids


SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}


def lively(family: str, layers: int = 2) -> Any:
    """Answers that change from token to token, which those of tied embeddings do not, and end where a mode says so."""
    model: Any = tiny(family, layers=layers, tie_word_embeddings=False)
    model.generation_config.eos_token_id = None
    model.generation_config.num_assistant_tokens_schedule = "constant"  # a draft learns nothing for the next call
    return model


def slightly_off(model: Any) -> Any:
    """A draft of four tokens at a time, of which some are right."""
    model.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.std() * torch.randn(parameter.shape, generator=noise), alpha=0.1)
    return model


def play(mode: Mode, side: Side) -> Answer:
    """What a mode gives on one side."""
    torch.manual_seed(11)
    with torch.no_grad():
        return mode.play(side)


def play_stock(mode: Mode, side: Side, other_versions: str) -> Answer:
    """What it gives on the side of the stock model. Where that is one of other versions, it may not be able to."""
    try:
        return play(mode, side)
    except RuntimeError as error:
        if not other_versions:
            raise
        pytest.skip(f"the stock model of {other_versions} cannot do it: {first_line(error)}")


def eager(stats: Mapping[str, int]) -> dict[str, int]:
    """What the eager model had to do, and why."""
    return {key.removeprefix("eager: "): count for key, count in stats.items() if key.startswith("eager: ")}
