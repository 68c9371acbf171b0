"""Agreement where it counts: KL and top-1 agreement at the tokens of the right answers.

Over a whole text most tokens are easy for both models; at answers they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...base.progress import Tick, silent
from .closed_book import prompt_of
from .questions import Question
from .speaker import Speaker


def agreement(
    dense: Speaker, compressed: Speaker, questions: Sequence[Question], *, tick: Tick = silent
) -> dict[str, Any]:
    """Return KL(dense || compressed) in nats and top-1 agreement, means over answers' tokens."""
    kl, same, n = 0.0, 0, 0
    for question in questions:
        prompt, answer = prompt_of(question.question), f" {question.answers[0]}"
        log_p, ids = dense.log_probs(prompt, answer)
        log_q = compressed.log_probs(prompt, answer)[0].to(log_p.device)
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"the models have vocabularies of {log_p.shape[-1]} and {log_q.shape[-1]} tokens: "
                "compare a model with the one it was made from"
            )
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        n += len(ids)
        tick()
    return {"kl_nats": kl / n, "top1_agreement": same / n, "n_tokens": n}
