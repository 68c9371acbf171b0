"""Accuracy on tasks of lm-evaluation-harness: 1 minus the mean over tasks.

    --fitness "lm_eval:tasks=arc_easy|piqa,limit=200"

Needs `pip install "hf-evopress[lm-eval]"`. Each candidate runs all the tasks, so that it costs
far more than `kl` and its accuracies of a few hundred questions are coarse: good for a final
choice among few plans, such as those of a front, rather than for a search.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from .base import Fitness, Targets


class LMEval(Fitness):
    """tasks: names with | between; limit: questions of each; metric: as lm-eval calls it."""

    name = "lm_eval"
    judges_models = True

    def __init__(self, *, tasks: str, limit: int = 200, metric: str = "acc") -> None:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise ImportError(
                'fitness lm_eval needs lm-evaluation-harness: pip install "hf-evopress[lm-eval]"'
            ) from error
        if limit < 1:
            raise ValueError(f"lm_eval needs limit >= 1 questions, got {limit}")
        self.tasks, self.limit, self.metric = tasks.split("|"), limit, metric
        self._evaluate, self._wrap = lm_eval.simple_evaluate, HFLM
        self._wrapped: Any = None

    def __repr__(self) -> str:
        return f"{self.name}:tasks={'|'.join(self.tasks)},limit={self.limit},metric={self.metric}"

    def of_model(self, model: Any) -> float:
        """Return 1 minus the mean of the metric over the tasks."""
        if self._wrapped is None:
            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
            self._wrapped = self._wrap(pretrained=model, tokenizer=tokenizer)
        found = self._evaluate(
            model=self._wrapped, tasks=self.tasks, limit=self.limit, bootstrap_iters=0
        )["results"]
        return 1 - sum(self._value(task, found) for task in self.tasks) / len(self.tasks)

    def _value(self, task: str, found: dict[str, dict[str, Any]]) -> float:
        # lm-eval names a metric with the filter of answers that it was taken after
        values = {k.partition(",")[0]: v for k, v in found.get(task, {}).items()}
        if self.metric not in values:
            known = [k for k, v in values.items() if isinstance(v, float) and "stderr" not in k]
            raise ValueError(f"task {task} has no metric {self.metric!r}; it has: {known}")
        return float(values[self.metric])

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return nothing: the tasks have their own texts."""
        return {}

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> float:
        raise TypeError("fitness lm_eval judges whole models, not logits: it cannot be mixed")
