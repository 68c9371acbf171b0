"""A model and its tokenizer as the probes use them: greedy text and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ...models.source import context_of


class Speaker:
    """Writes greedily and scores given text, one prompt at a time.

    Not in batches: sums of padded rows are rounded otherwise, which changes tokens that are nearly
    tied, and not all models can be padded on the left.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = context_of(model.config) or 10**9

    @torch.no_grad()
    def write(self, prompt: str, n_tokens: int, *, stop: str | None = "\n") -> str:
        """Return the greedy continuation of `prompt`, up to `stop`, without blanks around it.

        No more is written than up to a `stop` that follows a character which is no blank.
        """
        ids = self._ids(prompt)
        if ids.shape[1] + n_tokens > self.context:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and {n_tokens} to write are more than the "
                f"model's context of {self.context}: give shorter passages"
            )
        padding = self.tokenizer.pad_token_id
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.eos_token_id if padding is None else padding,
            stopping_criteria=[AfterStop(stop, self._text, ids.shape[1])] if stop else [],
        )
        text = self._text(made[0, ids.shape[1] :]).strip()
        return text.partition(stop)[0].strip() if stop else text

    @torch.no_grad()
    def log_probs(self, prompt: str, continuation: str) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (n, vocabulary) where the n tokens of `continuation` are
        predicted, and the ids (n,) of these tokens."""
        before, whole = self._ids(prompt), self._ids(prompt + continuation)
        start = _shared(before[0], whole[0])
        logits = self.model(input_ids=whole, use_cache=False).logits[0, start - 1 : -1]
        return logits.float().log_softmax(-1), whole[0, start:]

    def likelihood(self, prompt: str, continuation: str) -> float:
        """Return the log-likelihood in nats of `continuation` after `prompt`."""
        log_probs, ids = self.log_probs(prompt, continuation)
        return float(log_probs.gather(-1, ids[:, None]).sum(dtype=torch.float64))

    def cut(self, text: str, n_tokens: int) -> str:
        """Return the beginning of `text`, at most n_tokens tokens of it."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return text if len(ids) <= n_tokens else str(self.tokenizer.decode(ids[:n_tokens]))

    def as_user(self, text: str, otherwise: str) -> str:
        """Return `text` as a user's message under the chat template; `otherwise` without one."""
        if not self.tokenizer.chat_template:
            return otherwise
        message = [{"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )

    def _ids(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt").input_ids.to(self.model.device)

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class AfterStop(StoppingCriteria):
    """Stops each text once `stop` is in what was written after the first `start` tokens.

    transformers' own for strings also stops at blanks that a text begins with.
    """

    def __init__(self, stop: str, text: Callable[[Tensor], str], start: int) -> None:
        self.stop, self.text, self.start = stop, text, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        done = [self.stop in self.text(ids[self.start :]).lstrip() for ids in input_ids]
        return torch.tensor(done, device=input_ids.device)


def _shared(before: Tensor, whole: Tensor) -> int:
    """Return how many first tokens of `whole` are those of the prompt, at least 1.

    A token may reach over the border, and a tokenizer may close every text with a token.
    """
    n = min(len(before), len(whole) - 1)
    same = (before[:n] == whole[:n]).long().cumprod(0)
    return max(1, int(same.sum()))
