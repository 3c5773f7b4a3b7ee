"""A tokenizer for tiny models, made without files: token 5 is the word w5."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fxopt.families import VOCABULARY

#: Transformers looks for stop strings behind this word.
STOP_PREFIX = "abcdef"

CHAT = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)


def word_tokenizer() -> Any:
    """Pads on the left, and has a chat template: w3 is before what a user says, w4 before an answer."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY - 1)}
    words[STOP_PREFIX] = VOCABULARY - 1
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", chat_template=CHAT, **specials)
