"""``verify``: does an optimised model say the same as the stock model to the user's own prompts?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel

from fxopt.errors import InvalidRequestError
from fxopt.progress import Progress

SHOWN = 40  # characters of a prompt in the table


@dataclass(frozen=True)
class PromptCheck:
    """One prompt: how far the tokens agree, and how far the logits do until then."""

    prompt: str
    tokens: int  # that the stock model generated
    agreed: int  # of them before the first that differs
    divergence: int | None  # the first new token that differs
    margin: float | None  # by how much the stock model preferred its own token there
    max_error: float  # of the logits up to there
    mean_error: float

    @property
    def same(self) -> bool:
        return self.divergence is None


@dataclass(frozen=True)
class TokenCheck:
    """Every prompt, and one hash of everything that either model said."""

    prompts: tuple[PromptCheck, ...]
    stock_hash: str
    fast_hash: str

    @property
    def same(self) -> bool:
        return all(prompt.same for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}

    def __str__(self) -> str:
        headers = ["prompt", "tokens", "agree", "first difference", "margin there", "max error", "mean error"]
        rows = [
            [
                p.prompt if len(p.prompt) <= SHOWN else p.prompt[: SHOWN - 1] + "…",
                p.tokens,
                p.agreed,
                "" if p.divergence is None else p.divergence,
                "" if p.margin is None else f"{p.margin:.1e}",
                f"{p.max_error:.1e}",
                f"{p.mean_error:.1e}",
            ]
            for p in self.prompts
        ]
        table = tabulate(
            rows, headers=headers, tablefmt="simple", colalign=("left", *["right"] * 6), disable_numparse=True
        )
        verdict = "the same tokens" if self.same else "DIFFERENT TOKENS"
        return f"{table}\n\nhash {self.stock_hash} stock, {self.fast_hash} fxopt: {verdict}"


def verify(
    model: PreTrainedModel,
    fast: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 32,
    batch_size: int = 1,
) -> TokenCheck:
    """Generate greedily with both; ``batch_size`` prompts together, padded on the left.

    ``prompts`` are texts (with a ``tokenizer``) or rows of token ids.
    """
    if batch_size < 1:
        raise InvalidRequestError(f"batch_size={batch_size} is too small; give at least 1")
    texts, rows = _rows(prompts, tokenizer)
    if not all(rows):
        raise InvalidRequestError("a prompt is empty; give at least one token each")
    if not rows:
        raise InvalidRequestError("there are no prompts to verify with; give at least one")
    checks: list[PromptCheck] = []
    said: tuple[list[str], list[str]] = ([], [])
    progress = Progress()
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        tokens, mask = _padded(rows[part], _pad_token(model), model.device)
        with progress.step(f"prompts {start + 1} to {min(start + batch_size, len(rows))} of {len(rows)}"):
            stock, ours = (_generated(m, tokens, mask, max_new_tokens) for m in (model, fast))
        for row, text in enumerate(texts[part]):
            checks.append(_compared(text, stock, ours, row))
        for words, (new, _) in zip(said, (stock, ours), strict=True):
            words += [_decoded(tokenizer, ids) for ids in new.tolist()]
    return TokenCheck(tuple(checks), _hash(said[0]), _hash(said[1]))


@dataclass(frozen=True)
class SameTokens:
    """A check for :func:`fxopt.bisect`: greedy tokens for some prompts are those of ``model``."""

    model: Any
    rows: tuple[tuple[int, ...], ...]
    max_new_tokens: int = 32
    batch_size: int = 1

    @classmethod
    def of(
        cls, model: PreTrainedModel, prompts: Any, tokenizer: Any = None, max_new_tokens: int = 32, batch_size: int = 1
    ) -> SameTokens:
        _, rows = _rows(prompts, tokenizer)
        return cls(model, tuple(map(tuple, rows)), max_new_tokens, batch_size)

    def __call__(self, fast: PreTrainedModel) -> bool:
        options = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        found = verify(self.model, fast, self.rows, **options)
        if not found.same:
            worst = next(prompt for prompt in found.prompts if not prompt.same)
            raise ValueError(f"new token {worst.divergence} differs for a prompt of {worst.prompt}")
        return True

    def source(self) -> str:
        """The same as code."""
        rows = [list(row) for row in self.rows]
        return (
            "def check(fast):\n"
            f"    prompts = {rows!r}\n"
            f"    found = fxopt.verify(model, fast, prompts, max_new_tokens={self.max_new_tokens}, "
            f"batch_size={self.batch_size})\n"
            "    print(found)\n"
            "    return found.same"
        )


def _rows(prompts: Any, tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise InvalidRequestError(f"prompts={prompts!r}: give texts, or rows of token ids")
    prompts = list(prompts)
    if not all(isinstance(prompt, (str, Iterable)) for prompt in prompts):
        raise InvalidRequestError(f"prompts={prompts!r}: give texts, or rows of token ids")
    if not any(isinstance(prompt, str) for prompt in prompts):
        rows = [[int(token) for token in prompt] for prompt in prompts]
        return [f"{len(row)} tokens" for row in rows], rows
    if tokenizer is None:
        raise InvalidRequestError("the prompts are text, but no tokenizer was given; pass tokenizer=")
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [" ".join(prompt.split()) for prompt in prompts], rows


def _pad_token(model: PreTrainedModel) -> int:
    config = model.generation_config
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return next((int(token) for token in (config.pad_token_id, eos) if token is not None), 0)


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    tokens = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _generated(model: Any, tokens: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """New tokens [B, T] and the logits that led to them [T, B, V]."""
    output = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
        pad_token_id=_pad_token(model),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, tokens.shape[1] :], torch.stack(output.logits)


def _compared(text: str, stock: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], row: int) -> PromptCheck:
    wanted, found = stock[0][row].tolist(), ours[0][row].tolist()
    agreed = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), None)
    if agreed is None and len(wanted) != len(found):
        agreed = min(len(wanted), len(found))
    steps = min(len(wanted), len(found)) if agreed is None else min(agreed + 1, len(wanted), len(found))
    difference = (stock[1][:steps, row].double() - ours[1][:steps, row].double()).nan_to_num().abs()
    margin = None
    if agreed is not None and agreed < min(len(wanted), len(found)):
        logits = stock[1][agreed, row].double()
        margin = float(logits[wanted[agreed]] - logits[found[agreed]])
    count = len(wanted)
    return PromptCheck(
        text,
        count,
        count if agreed is None else agreed,
        agreed,
        margin,
        float(difference.max()) if difference.numel() else 0.0,
        float(difference.mean()) if difference.numel() else 0.0,
    )


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens)) if tokenizer is not None else " ".join(map(str, tokens))


def _hash(texts: Iterable[str]) -> str:
    """The first eight hex digits of the sha256 of everything that was said, in order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
