"""What an error of the embedding or of the head costs, and what their levels are made from.

With h_t the final hidden states, p_t what the model says next and n_v how often token v comes, an
error dW of the head and dE of the embedding add to the KL divergence per token about

    1/2 mean_t Var_{v ~ p_t}(dW_v . h_t)      and      1/2 sum_v n_v dE_v F dE_v^T,

F the second moment of the gradient at the looked-up rows. The first is the softmax's own form
diag(p) - p p^T applied to dW h, estimated from tokens drawn from p_t: nothing of the size of the
vocabulary squared is ever made. Where both ends share a weight, the two add up. Counts are
smoothed: tokens that the text does not use get the share that Good and Turing give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..base.reading import ANEW, reading
from ..base.resources import atomic_path
from ..methods.maths.linalg import Stats
from ..models.classes import embedded, n_losses
from ..models.ends import embedding_forward, input_embedding, output_head
from ..models.patching import patched
from ..models.stream import BlockStream
from ..models.units import Unit

FILE = "ends.safetensors"
STATS = "stats"  # the folder of input moments, which has one of all calibration text
HEAD_FILE = "head.safetensors"
DRAWN = 64  # tokens drawn from what the model says at each position
_CHUNK = 128  # positions whose rows of an error are looked at together


@dataclass(frozen=True)
class EndMoments:
    """What one end, or one weight that serves as both, is to the loss.

    hidden (t, d), drawn (t, DRAWN) int32 token ids, slopes (t, DRAWN) of the logits in the head's
    outputs, gram (d, d) of the hidden states weighed by 1 - sum p^2: of a head, else None.
    gradient (d, d) and counts (v,), which add up to 1: of an embedding, else None.
    """

    hidden: Tensor | None = None
    drawn: Tensor | None = None
    slopes: Tensor | None = None
    gram: Tensor | None = None
    gradient: Tensor | None = None
    counts: Tensor | None = None

    def stats(self) -> Stats:
        """Return what levels are made from: both uses, each weighed by what it does to the loss."""
        parts = [part for part in (self.gram, self._mean_gradient()) if part is not None]
        n = 0 if self.hidden is None else len(self.hidden)
        return Stats(torch.stack(parts).sum(0), n_tokens=n, rows=self.rows())

    def rows(self) -> Tensor:
        """Return what an error of each row costs, (v,) float32: both uses, as in `loss`.

        For errors alike in all directions: how often the head is asked for a token times the size
        of what asks, and how often the token comes in times the gradient's size.
        """
        total: Tensor | None = None
        if self.drawn is not None and self.gram is not None:
            n_rows = int(self.drawn.max()) + 1 if self.counts is None else len(self.counts)
            asked = torch.bincount(self.drawn.flatten().long(), minlength=n_rows).float()
            total = asked / asked.sum() * self.gram.diagonal().sum()
        if self.gradient is not None and self.counts is not None:
            comes = self.counts * self.gradient.diagonal().sum()
            total = comes if total is None else total + comes
        assert total is not None  # an end is one of the two
        return total

    def loss(self, delta: Tensor) -> float:
        """Return the KL in nats per token that an error (v, d) is expected to add."""
        return self.head_loss(delta) + self.embedding_loss(delta)

    def head_loss(self, delta: Tensor) -> float:
        if self.hidden is None or self.drawn is None:
            return 0.0
        total = 0.0
        for start in range(0, len(self.hidden), _CHUNK):
            some = slice(start, start + _CHUNK)
            rows = delta[self.drawn[some].long().to(delta.device)]
            moved = torch.bmm(rows, self.hidden[some].to(delta.device)[:, :, None])[:, :, 0]
            if self.slopes is not None:
                moved = moved * self.slopes[some].to(delta.device)
            total += float(moved.var(dim=1).sum())
        return 0.5 * total / len(self.hidden)

    def embedding_loss(self, delta: Tensor) -> float:
        if self.gradient is None or self.counts is None:
            return 0.0
        F, n = self.gradient.to(delta.device), self.counts.to(delta.device)
        return 0.5 * float(((delta @ F) * delta).sum(1) @ n)

    def _mean_gradient(self) -> Tensor | None:
        """Return the gradient moment on the scale of the gram: rows there count as p says."""
        return self.gradient


class EndRecorder:
    """Collects the moments of a model's ends while it is gone through forwards and backwards."""

    def __init__(self, model: Any, units: Sequence[Unit], *, seed: int) -> None:
        self.model, self.units = model, units
        roles = {unit.role for unit in units}
        self.of_head = bool(roles & {"head", "tied"})
        self.of_embedding = bool(roles & {"embedding", "tied"})
        self._generator = torch.Generator().manual_seed(seed)
        self._hidden: list[Tensor] = []
        self._drawn: list[Tensor] = []
        self._slopes: list[Tensor] = []
        self._gram: Tensor | None = None
        self._gradient: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._n_losses = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what goes into the head and what comes out of it."""
        found = output_head(self.model) if self.of_head else None
        if found is None:
            yield
            return

        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen = (args[0].detach(), output)

        hook = found[1].register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def head(self, logits: Tensor, p: Tensor) -> None:
        """Take in some positions: logits (t, v) with their graph, p (t, v) on the CPU."""
        if self._seen is None:
            return
        hidden, output = self._seen
        self._seen = None
        (slopes,) = torch.autograd.grad(logits.sum(), output, retain_graph=True)
        drawn = torch.multinomial(p, DRAWN, replacement=True, generator=self._generator)
        hidden, slopes = hidden.flatten(0, -2).float(), slopes.flatten(0, -2).float()
        weight = 1 - p.square().sum(-1).to(hidden.device)
        gram = hidden.T @ (hidden * weight[:, None])
        self._gram = gram if self._gram is None else self._gram + gram
        self._hidden.append(hidden.cpu())
        self._drawn.append(drawn.to(torch.int32))
        self._slopes.append(slopes.gather(1, drawn.to(slopes.device)).cpu())

    def embedding(self, stream: BlockStream, ids: Tensor, gradient: Tensor, scale: float) -> None:
        """Take in the gradient at the input of the first block for some sequences (batch, seq)."""
        found = input_embedding(self.model) if self.of_embedding else None
        if found is None:
            return
        name, module = found
        with torch.enable_grad():
            looked_up = embedded(self.model, ids)
            rows = module.weight[looked_up.to(module.weight.device)].detach()
            rows = stream.place.bring(rows).requires_grad_()
            forward = embedding_forward(module, lambda _: rows)
            with patched(self.model, {name: forward}):
                hidden = stream.embed(ids)
            (g,) = torch.autograd.grad(hidden, rows, stream.place.on_device(gradient))
        g = g.flatten(0, 1).float() / scale
        moment = g.T @ g
        self._gradient = moment if self._gradient is None else self._gradient + moment
        self._n_losses += n_losses(self.model, ids)

    def write(self, path: Path, counted: Tensor) -> None:
        """Write the moments to `path`; counted (n_sequences, seq_len): the text to count in."""
        tensors: dict[str, Tensor] = {}
        if self._gram is not None:
            tensors["hidden"] = torch.cat(self._hidden)
            tensors["drawn"] = torch.cat(self._drawn)
            slopes = torch.cat(self._slopes)
            if not bool((slopes == 1).all()):
                tensors["slopes"] = slopes
            tensors["gram"] = self._gram / len(tensors["hidden"])
        if self._gradient is not None:
            tensors["gradient"] = self._gradient / self._n_losses
            n_rows = next(u.shape[0] for u in self.units if u.role != "head")
            tensors["counts"] = smoothed_counts(counted, n_rows)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"the {name} of the model's ends hold inf or NaN: load the model in bfloat16 "
                    "or float32 and check its weights"
                )
        with atomic_path(path) as temporary:
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary)


def smoothed_counts(tokens: Tensor, n_rows: int) -> Tensor:
    """Return how often each of `n_rows` tokens comes, (n_rows,) float32, adding up to 1.

    All counts are raised by the same amount, so that tokens never seen together get the share
    of those seen once (Good 1953): that many will be new in the next text.
    """
    counts = torch.bincount(tokens.flatten().cpu(), minlength=n_rows)[:n_rows].double()
    total, unseen = counts.sum(), int((counts == 0).sum())
    once = min(max(float((counts == 1).sum() / total), 1 / float(total)), 0.5)
    more = once * total / max(1, unseen) if unseen else 0.0
    counts += more
    return (counts / counts.sum()).float()


def load_ends(folder: str | Path, units: Sequence[Unit]) -> Mapping[str, EndMoments]:
    """Return the moments of each end among `units`, from the file in `folder`/moments."""
    ends = [unit for unit in units if unit.is_end]
    if not ends:
        return {}
    path = Path(folder) / "moments" / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no moments of the model's ends at {path}: run output_moments")
    with reading(path, way_out=ANEW):
        tensors = load_file(path)
    more = Path(folder) / STATS / HEAD_FILE
    if "gram" in tensors and more.is_file():
        with reading(more, way_out=ANEW):
            tensors["gram"] = _of_more_text(load_file(more)["gram"], tensors)
    of_head = ("hidden", "drawn", "slopes", "gram")
    of_role = {"head": of_head, "embedding": ("gradient", "counts")}
    return {
        unit.name: EndMoments(
            **{k: v for k, v in tensors.items() if k in of_role.get(unit.role, tensors)}
        )
        for unit in ends
    }


def _of_more_text(gram: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the moment of hidden states over all calibration text, on the scale of the weighed.

    Of the few tokens that went backwards, levels would be made to fit those tokens: at 4 bits
    SmolLM2-135M lost twice what was predicted.
    """
    plain = tensors["hidden"].square().sum(1).mean()
    return gram * (tensors["gram"].diagonal().sum() / plain)
