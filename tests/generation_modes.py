"""Every way of calling ``generate`` that Transformers has, by the code that serves it."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY

import torch
from transformers import DynamicCache, StaticCache
from ways_to_generate import (
    IDS,
    LONG,
    MAX_LEN,
    NEW,
    ONE,
    PADDED,
    PADDED_RIGHT,
    PROMPT,
    SAMPLED,
    TEXTS,
    WITH_CACHE,
    AfterSixteen,
    Forbid,
    Its,
    Mode,
    Said,
    a_cache_that_was_reset,
    after_an_interrupt,
    another_call_in_between,
    attentions,
    by_config,
    call,
    crop_and_go_on,
    early_exit,
    embeddings,
    forward,
    in_training,
    one_row_ends_early,
    own_loop,
    piped,
    streamed,
    streamed_from_a_thread,
    three_turns,
    two_answers_from_one_prompt,
    until_a_word,
    with_cache,
)

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
