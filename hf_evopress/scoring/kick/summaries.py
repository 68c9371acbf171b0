"""Summaries of documents, compared with those of the dense model by ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...base.progress import Tick, silent
from .speaker import Speaker

N_TOKENS = 64
ROOM = 96  # tokens of the context kept for the words around a document


def summarise(speaker: Speaker, documents: Sequence[str], *, tick: Tick = silent) -> list[str]:
    """Return one greedy summary per document, which is cut to what the context holds."""
    made = []
    for document in documents:
        text = speaker.cut(document.strip(), max(16, speaker.context - N_TOKENS - ROOM))
        prompt = speaker.as_user(
            f"Summarise this text in two sentences.\n\n{text}",
            otherwise=f"Text: {text}\n\nSummary in two sentences:",
        )
        made.append(speaker.write(prompt, N_TOKENS, stop=None))
        tick()
    return made


def rouge_l(reference: str, text: str) -> float:
    """Return the F1 of the longest common subsequence of words, between 0 and 1 (Lin 2004).

    >>> round(rouge_l("the cat sat on the mat", "the cat on a mat"), 3)
    0.727
    """
    a, b = (re.findall(r"\w+", words.lower()) for words in (reference, text))
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        left = diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            left = diagonal + 1 if word == other else max(above, left)
            diagonal, row[j] = above, left
    return 2 * row[-1] / (len(a) + len(b))
