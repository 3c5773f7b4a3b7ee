"""Every way of calling ``generate`` that Transformers has, beside the stock model: the same tokens.

A mode is a way to use a model that ends in what a user would look at. It runs on the stock model and
on the optimised one under the same seed, and ``fast.fxopt.stats`` says which code served the second.
"""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from words import word_tokenizer

import fxopt
from fxopt.families import SLIDING, VOCABULARY, tiny

FAMILIES = ["llama", "gemma2", "mixtral", "gpt2"]
MAX_LEN = 96
CHUNK = 16
PROMPT = 9
NEW = 20
assert PROMPT + NEW > SLIDING  # so that answers leave the sliding windows behind


def _prompts(rows: int, tokens: int, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


IDS = _prompts(2, PROMPT)
MASK = torch.ones_like(IDS)
LEFT, RIGHT = MASK.clone(), MASK.clone()
LEFT[1, :4] = 0
RIGHT[1, -4:] = 0

ONE = {"input_ids": IDS[:1]}
TWO = {"input_ids": IDS}
PADDED = {"input_ids": IDS * LEFT, "attention_mask": LEFT}
PADDED_RIGHT = {"input_ids": IDS * RIGHT, "attention_mask": RIGHT}
LONG = {"input_ids": _prompts(2, 2 * CHUNK + 7)}
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


# What options can be made of.


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
            said = _prompts(len(dialogue), 3 + turn)
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
    other = torch.cat([out.sequences[:, :-6], _prompts(1, 4)], dim=1)
    return Answer.of(side.model.generate(other, past_key_values=out.past_key_values, **GREEDY))


def another_call_in_between(side: Side) -> Answer:
    first = side.model.generate(**TWO, **GREEDY | {"max_new_tokens": 6}, **WITH_CACHE)
    between = side.model.generate(**PADDED, **GREEDY)
    longer = torch.cat([first.sequences, IDS], dim=1)
    return Answer.of(between, side.model.generate(longer, past_key_values=first.past_key_values, **GREEDY))


def two_answers_from_one_prompt(side: Side) -> Answer:
    """The cache of a system prompt is copied for each question."""
    system = side.model(**TWO, use_cache=True).past_key_values
    questions = [torch.cat([IDS, _prompts(2, 3 + i)], dim=1) for i in range(2)]
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
BEAMS: dict[str, Any] = {"num_beams": 3}
SCORES: dict[str, Any] = {"output_scores": True, "output_logits": True, **WITH_CACHE}
FEWER_LAYERS = {"other layers than were captured": ANY}
UNCUT = {"gpt2": "its code runs all layers, whatever config.num_hidden_layers says"}

#: Served by the graphs, in the loop of the optimised model.
FAST_LOOP: dict[str, Mode] = {
    "greedy": Mode(call()),
    "greedy, one row": Mode(call(ONE)),
    "greedy, left-padded": Mode(call(PADDED)),
    "greedy, right-padded": Mode(call(PADDED_RIGHT)),
    "greedy, several chunks": Mode(call(LONG)),
    "no prompt": Mode(call({}, bos_token_id=5)),
    "sampling": Mode(call(do_sample=True, temperature=1.3, top_k=20, top_p=0.9), bites=True),
    "plain sampling": Mode(call(**SAMPLED), bites=True),
    "several samples": Mode(call(**SAMPLED, num_return_sequences=3), bites=True),
    "streamer": Mode(streamed),
    "streamer in a thread": Mode(streamed_from_a_thread),
    "one eos": Mode(call(ONE, eos_token_id=Said(0, 5)), bites=True),
    "several eos": Mode(call(eos_token_id=[Said(0, 7), Said(1, 9)], pad_token_id=1), bites=True),
    "one row ends early": Mode(one_row_ends_early, bites=True),
    "repetition penalty": Mode(call(repetition_penalty=3.0), bites=True),
    "no repeated n-grams": Mode(call(no_repeat_ngram_size=1), bites=True),
    "a least number of tokens": Mode(call(ONE, eos_token_id=Said(0, 5), min_new_tokens=12), bites=True),
    "bad words": Mode(call(bad_words_ids=[[Said(0, 4)]]), bites=True),
    "a processor of one's own": Mode(call(logits_processor=[Forbid()]), bites=True),
    "allowed tokens only": Mode(call(prefix_allowed_tokens_fn=lambda row, ids: list(range(60, 90))), bites=True),
    "guidance": Mode(call(guidance_scale=3.0), bites=True),
    "guidance against a prompt": Mode(call(ONE, guidance_scale=3.0, negative_prompt_ids=IDS[1:]), bites=True),
    "positions of one's own": Mode(call(position_ids=torch.arange(PROMPT)[None] + 3)),
    "static cache by name": Mode(call(cache_implementation="static")),
    "prefill in chunks": Mode(call(prefill_chunk_size=4)),
    "prefill in chunks, left-padded": Mode(call(PADDED, prefill_chunk_size=4)),
    "three turns": Mode(three_turns(ONE)),
    "three turns, left-padded": Mode(three_turns(PADDED)),
    "crop and go on": Mode(crop_and_go_on),
    "another call in between": Mode(another_call_in_between),
    "two answers from one prompt": Mode(two_answers_from_one_prompt),
    "after an interrupt": Mode(after_an_interrupt),
    "a cache that was reset": Mode(a_cache_that_was_reset),
    "pipeline": Mode(piped(TEXTS[0])),
    "pipeline, padded batches": Mode(piped(TEXTS, batch_size=2)),
}

#: Served by the graphs, in a loop of Transformers or of the user.
OTHER_LOOPS: dict[str, Mode] = {
    "beams": Mode(call(**BEAMS), bites=True),
    "beams, left-padded": Mode(call(PADDED, **BEAMS)),
    "sampled beams": Mode(call(**BEAMS, **SAMPLED), bites=True),
    "several beams": Mode(call(**BEAMS, num_return_sequences=2, early_stopping=True, eos_token_id=Said(0, 5))),
    "scores of beams": Mode(call(**BEAMS, **SCORES)),
    "a whole generation config": Mode(by_config, bites=True),
    "stopping criteria": Mode(call(stopping_criteria=[AfterSixteen()]), bites=True),
    "stop strings": Mode(until_a_word, bites=True),
    "time is up": Mode(call(max_time=1e-9), bites=True),
    "time enough": Mode(call(max_time=600.0)),
    "scores and logits": Mode(call(PADDED, **SCORES, repetition_penalty=1.5)),
    "assisted": Mode(call(ONE, assistant_model=Its("draft"))),
    "assisted by an optimised draft": Mode(call(ONE, assistant_model=Its("own_draft"))),
    "assisted by itself": Mode(call(ONE, assistant_model=Its("model"))),
    "assisted sampling": Mode(call(ONE, assistant_model=Its("own_draft"), **SAMPLED), bites=True),
    "assisted, with scores": Mode(call(ONE, assistant_model=Its("own_draft"), **SCORES)),
    "three turns, assisted": Mode(three_turns(ONE, assistant_model=Its("draft")), since="5.23"),
    "prompt lookup": Mode(call(ONE, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)),
    "prompt lookup, sampling": Mode(call(ONE, prompt_lookup_num_tokens=3, **SAMPLED), bites=True),
    "a decoding loop of one's own": Mode(call(custom_generate=own_loop), bites=True),
}

#: Served by the model's own code, in part or altogether, and counted.
EAGER: dict[str, Mode] = {
    "early exit": Mode(early_exit(), eager=FEWER_LAYERS, unless=UNCUT, since="5.23"),
    "early exit, sampling": Mode(early_exit(**SAMPLED), bites=True, eager=FEWER_LAYERS, unless=UNCUT, since="5.23"),
    "embeddings": Mode(embeddings, eager={"inputs_embeds given": 1}),
    "no cache": Mode(call(use_cache=False), eager={"use_cache=False": NEW}),
    "training": Mode(in_training, eager={"training mode": NEW}),
    "attentions": Mode(attentions, eager={"output_attentions given": NEW}),
    "hidden states": Mode(call(output_hidden_states=True, **WITH_CACHE), eager={"output_hidden_states given": NEW}),
    "labels": Mode(forward(labels=IDS), eager={"labels given": 1}),
    "dynamic cache by name": Mode(call(cache_implementation="dynamic"), eager={"a foreign cache (DynamicCache)": NEW}),
    "a dynamic cache": Mode(
        with_cache(lambda config: DynamicCache(config=config)), eager={"a foreign cache (DynamicCache)": NEW}
    ),
    "a static cache": Mode(
        with_cache(lambda config: StaticCache(config, MAX_LEN)), eager={"a foreign cache (StaticCache)": NEW}
    ),
}

MODES = FAST_LOOP | OTHER_LOOPS | EAGER

#: Ways to generate that Transformers moved to repositories of code on the Hub, which nobody runs here.
ON_THE_HUB: dict[str, dict[str, Any]] = {
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "constrained beams": {"num_beams": 2, "force_words_ids": [[5]]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
}


@dataclass(frozen=True)
class Bench:
    family: str
    stock: Side
    fast: Side
    stats: Callable[[], Counter[str]]  # of the optimised model and its draft together


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> Bench:
    model, draft = lively(request.param), slightly_off(lively(request.param))
    options: dict[str, Any] = {"max_len": MAX_LEN, "backend": "eager", "chunk": CHUNK, "verify": "off"}
    fast: Any = fxopt.optimize(model, **options)
    fast_draft: Any = fxopt.optimize(draft, **options, passes="minimal")
    greedy = model.generate(**TWO, **GREEDY).tolist()
    return Bench(
        request.param,
        Side(model, draft, draft, greedy),
        Side(fast, draft, fast_draft, greedy),
        lambda: fast.fxopt.stats + fast_draft.fxopt.stats,
    )


def lively(family: str) -> Any:
    """Answers that change from token to token, which those of tied embeddings do not, and end where a mode says so."""
    model: Any = tiny(family, tie_word_embeddings=False)
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


GRAPHS = {"prefill", "decode", "score", "verify"}


def eager(stats: Mapping[str, int]) -> dict[str, int]:
    """What the eager model had to do, and why."""
    return {key.removeprefix("eager: "): count for key, count in stats.items() if key.startswith("eager: ")}


def compiled(stats: Mapping[str, int]) -> dict[str, int]:
    return {key: count for key, count in stats.items() if key.startswith("compiled ")}


def play(mode: Mode, side: Side) -> Answer:
    torch.manual_seed(11)
    with torch.no_grad():
        return mode.play(side)


@pytest.mark.parametrize("name", MODES)
def test_mode(bench: Bench, name: str) -> None:
    mode = MODES[name]
    if reason := mode.unless.get(bench.family):
        pytest.skip(f"not for the stock {bench.family}: {reason}")
    if Version(transformers.__version__) < Version(mode.since):
        pytest.skip(f"the stock model does it since Transformers {mode.since}")
    expected = play(mode, bench.stock)
    before = bench.stats()
    found = play(mode, bench.fast)
    ran = bench.stats() - before

    assert found.exact == expected.exact
    torch.testing.assert_close(found.close, expected.close, atol=1e-3, rtol=1e-3)
    assert eager(ran) == mode.eager
    if name not in EAGER:
        assert GRAPHS & ran.keys()
        assert ("loop: fast" in ran) == (name in FAST_LOOP)
    if mode.bites:
        assert expected.exact[0] not in (bench.stock.greedy, bench.stock.greedy[:1])


@pytest.mark.parametrize("mode", ON_THE_HUB)
def test_modes_that_need_code_from_the_hub_say_so_as_in_the_stock_model(bench: Bench, mode: str) -> None:
    refusals = []
    for side in (bench.stock, bench.fast):
        with pytest.raises(ValueError, match="trust_remote_code=True") as refusal:
            side.model.generate(**TWO, **GREEDY | ON_THE_HUB[mode])
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]


@dataclass(frozen=True)
class Session:
    """A stock model and the compiled one, for many calls in a row or side by side."""

    stock: Any
    fast: Any


@pytest.fixture(scope="module")
def session() -> Session:
    stock = lively("llama")
    return Session(stock, fxopt.optimize(stock, max_len=MAX_LEN, backend="aot_eager", chunk=CHUNK, verify="off"))


def test_two_threads_say_what_one_says(session: Session) -> None:
    dice, start = random.Random(3), threading.Barrier(2)
    batches = [[_prompts(dice.randint(1, 3), dice.randint(1, 24), 50 * k + i) for i in range(50)] for k in range(2)]

    def say(model: Any, prompts: list[Tensor]) -> list[Any]:
        return [model.generate(prompt, **GREEDY | {"max_new_tokens": 6}).tolist() for prompt in prompts]

    def say_together(prompts: list[Tensor]) -> list[Any]:
        start.wait(timeout=60)  # so that both need the same graphs first
        return say(session.fast, prompts)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(say_together, batches))
    assert found == [say(session.stock, prompts) for prompts in batches]
    assert eager(session.fast.fxopt.stats) == {}


@dataclass(frozen=True)
class Spoken:
    """One call of a long session, for ``batch`` sequences in all."""

    kind: str
    batch: int
    tokens: int
    new: int

    def by(self, model: Any) -> Any:
        ids = _prompts(self.batch, self.tokens, seed=self.new)
        torch.manual_seed(self.tokens)
        return KINDS[self.kind](model, ids, GREEDY | {"max_new_tokens": self.new}).tolist()


@torch.no_grad()
def logits_of_all(model: Any, ids: Tensor, options: Any) -> Tensor:
    likeliest: Tensor = model(ids).logits.argmax(-1)
    return likeliest


def left_padded(model: Any, ids: Tensor, options: Any) -> Any:
    mask = torch.ones_like(ids)
    mask[-1, : ids.shape[1] // 2] = 0
    return model.generate(ids, attention_mask=mask, **options)


def another_turn(model: Any, ids: Tensor, options: Any) -> Any:
    first = model.generate(ids, **options, **WITH_CACHE)
    return model.generate(torch.cat([first.sequences, ids], 1), past_key_values=first.past_key_values, **options)


KINDS: dict[str, Callable[[Any, Tensor, dict[str, Any]], Any]] = {
    "greedy": lambda model, ids, options: model.generate(ids, **options),
    "left-padded": left_padded,
    "sampling": lambda model, ids, options: model.generate(ids, **options | SAMPLED),
    "samples": lambda model, ids, options: model.generate(ids[:1], **options | SAMPLED, num_return_sequences=len(ids)),
    "beams": lambda model, ids, options: model.generate(ids[:1], **options, num_beams=len(ids)),
    "prompt lookup": lambda model, ids, options: model.generate(ids[:1], **options, prompt_lookup_num_tokens=3),
    "logits of all": logits_of_all,
    "another turn": another_turn,
}


def test_sixty_calls_compile_nothing(session: Session) -> None:
    """After each kind of call at each batch size nothing is compiled, and Dynamo never has a part in it."""
    dice, stats = random.Random(7), session.fast.fxopt.stats
    for batch in range(1, 5):
        for kind in KINDS:
            Spoken(kind, batch, tokens=CHUNK + 2, new=3).by(session.fast)
    before = compiled(stats)
    assert before
    counters.clear()
    calls = [
        Spoken(dice.choice(list(KINDS)), dice.randint(1, 4), dice.randint(1, 30), dice.randint(1, 12))
        for _ in range(60)
    ]
    for call in calls:
        assert call.by(session.fast) == call.by(session.stock), call
    assert compiled(stats) == before
    assert eager(stats) == {}
    assert not any(counters.values()), counters

    torch.compile(torch.neg, backend="eager")(torch.ones(1))
    assert counters["frames"]["total"] == 1  # which is where Dynamo would have been seen
