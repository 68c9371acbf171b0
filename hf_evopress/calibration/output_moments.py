"""Second moments of the output gradients of every unit: its sensitivity to errors.

With labels y_t sampled from the model's own distribution p_t, and g_t the gradient of
-sum_t log p_t(y_t) with respect to a unit's output at token t, a change dW of its weight adds
to the KL divergence per token about

    1/2 mean_t (g_t . dW x_t)^2  ~  1/2 tr(G dW H dW^T),   G = E[g g^T],  H = E[x x^T].

The right-hand side (Martens and Grosse 2015, arXiv:1503.05671: K-FAC) scores every level of
every unit, also levels made later, without another model run. It is smoother than the left-hand
side, whose noise a knapsack would exploit; that one is here as a diagnostic (`token_losses`).

Memory: hidden states wait on disk, one block at a time is run again with its graph and gone
backwards through; weights never get gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..base.fingerprint import claim, model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.placement import dtype_of
from ..base.progress import Progress
from ..base.ranks import ALONE, Ranks
from ..base.reading import ANEW, reading
from ..base.resources import atomic_path, scratch_folder
from ..models import images
from ..models.classes import class_of, embedded, n_losses
from ..models.experts import others
from ..models.images import example, n_text, only_text
from ..models.two_stacks import stream_of
from ..models.units import Unit, find_units
from ..models.vision import BLOCK as VISION
from .end_moments import FILE, EndRecorder
from .input_moments import Moment, check_tokens

FOLDER = "moments"
BATCH_TOKENS = 1024
_HEAD_POSITIONS = 256  # of 150k columns: 150 MB in float32


def kfac_loss(delta: Tensor, H: Tensor, G: Tensor) -> float:
    """Return 1/2 tr(G dW H dW^T), the KL in nats per token that an error dW is expected to add.

    delta (out, in); H (in, in) and G (out, out) second moments, all float32.
    """
    G, H = G.to(delta.device), H.to(delta.device)
    return 0.5 * float(((G @ delta) * (delta @ H)).sum())


def output_moments(
    model: nn.Module,
    tokens: Tensor,
    folder: str | Path,
    *,
    units: Sequence[Unit] | None = None,
    counted: Tensor | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Path:
    """Return `folder`/moments after writing G of every unit that is not there yet.

    tokens (n_sequences, seq_len) int64; a few thousand tokens are enough. One file per block,
    whole or absent: a killed run resumes. G is the mean over tokens of g g^T, (out, out) float32,
    and tokens that do not come to a unit, an expert, count as zeros. The ends among `units` have
    a file of their own (see `end_moments`), with the counts of tokens in `counted`.
    Raises ValueError where the folder holds moments made from something else.
    """
    units = list(units) if units is not None else find_units(model)
    ends = [unit for unit in units if unit.is_end]
    units = [unit for unit in units if not unit.is_end]
    check_tokens(tokens, model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    root = Path(folder) / FOLDER
    made_from = {
        "model": model_fingerprint(model),
        "units": text_fingerprint(*(unit.name for unit in units)),
        "tokens": tensor_fingerprint(tokens),
        "seed": seed,
        **images.made_from(model),
    }
    with ranks.first_alone():
        claim(root, made_from, what="output moments")
    by_block = _by_block(units)
    mine = [i for n, i in enumerate(sorted(by_block)) if ranks.owns(n)]
    missing = [i for i in mine if not _file(root, i).is_file()]
    lacks_ends = bool(ends) and ranks.is_first and not (root / FILE).is_file()
    recorder = EndRecorder(model, ends, seed=seed + 1) if lacks_ends else None
    if not missing and recorder is None:
        ranks.wait()
        return root
    with _Backward(
        model, tokens, root, seed=seed, batch_tokens=batch_tokens, recorder=recorder
    ) as backward:
        first = 0 if lacks_ends else max(0, min(missing))
        for block in reversed(range(first, backward.stream.n_blocks)):
            names = by_block[block] if block in missing else []
            moments = _block_moments(backward, block, names, backward.n_losses)
            if names:
                _write(_file(root, block), moments, names)
            if progress:
                progress("sensitivity", (n := backward.stream.n_blocks) - block, n - first)
        if VISION in missing:
            _write(_file(root, VISION), backward.vision(by_block[VISION]), by_block[VISION])
        if recorder is not None:
            backward.end()
            recorder.write(root / FILE, embedded(model, tokens if counted is None else counted))
    ranks.wait()
    return root


def _block_moments(
    backward: _Backward, block: int, names: Sequence[str], n_tokens: int
) -> dict[str, Tensor]:
    """Return G of the units `names` of one block, after going backwards through it."""
    moments: dict[str, Moment] = {}
    for pairs in backward.step(block, names):
        for name, (_, g) in pairs.items():
            if name not in moments:
                moments[name] = Moment(g, torch.float32)
            moments[name].add(g)
    _lend(moments, names)
    for moment in moments.values():  # experts see a part of the tokens
        moment.n_tokens = n_tokens
    return {name: moment.gram() for name, moment in moments.items()}


def load_moments(folder: str | Path, block: int) -> dict[str, Tensor]:
    """Return G (out, out) float32 of each unit of one block."""
    path = _file(Path(folder) / FOLDER, block)
    if not path.is_file():
        raise FileNotFoundError(f"no output moments at {path}: run output_moments first")
    with reading(path, way_out=ANEW):
        return load_file(path)


@dataclass(frozen=True)
class TokenLoss:
    """1/2 mean_t (g_t . dW x_t)^2 in nats per token, split by where in a sequence it arises."""

    first: float  # position 0, where attention sinks live
    rest: float

    @property
    def total(self) -> float:
        return self.first + self.rest


def token_losses(
    model: nn.Module,
    tokens: Tensor,
    deltas: Mapping[str, Tensor],
    *,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, TokenLoss]:
    """Return the token-level loss estimate of each unit's error dW (out, in).

    A diagnostic: a large share at position 0 is a broken attention sink. Not an objective for a
    knapsack, which would pick the units where one label per token happens to underestimate.
    """
    known = {unit.name: unit for unit in find_units(model)}
    for name in deltas:
        if name not in known:
            raise ValueError(f"the model has no unit {name!r}")
    by_block = _by_block([known[name] for name in deltas])
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in deltas}
    with (
        TemporaryDirectory() as scratch,
        _Backward(model, tokens, Path(scratch), seed=seed, batch_tokens=batch_tokens) as backward,
    ):
        for block in reversed(range(min(by_block), backward.stream.n_blocks)):
            for pairs in backward.step(block, by_block.get(block, [])):
                for name, (x, g) in pairs.items():
                    dy = F.linear(x.float(), deltas[name].to(x.device, torch.float32))
                    loss = (g.float() * dy).sum(-1).square()
                    loss = loss.view(-1, tokens.shape[1])  # some models flatten (batch, seq)
                    sums[name] += torch.stack([loss[:, 0].sum(), loss[:, 1:].sum()]).cpu()
    return {
        name: TokenLoss(*(0.5 * total / tokens.numel()).tolist()) for name, total in sums.items()
    }


def _lend(moments: dict[str, Moment], names: Sequence[str]) -> None:
    """Let experts that no token went to count as if one token of the other experts had."""
    seen = dict(moments)
    for name in names:
        if name not in seen and (lenders := others(name, seen)):
            lent = Moment.pooled([seen[lender] for lender in lenders])
            lent.total, lent.n_tokens = lent.total / lent.n_tokens, 1
            moments[name] = lent


class _Backward:
    """A model after a forward over all tokens, to be gone through backwards, block by block."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        folder: Path,
        *,
        seed: int,
        batch_tokens: int,
        recorder: EndRecorder | None = None,
    ) -> None:
        self.model, self._recorder = model, recorder
        self.stream = stream_of(model)
        self.kind = class_of(model)
        self.n_losses = n_losses(model, tokens)
        self.batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
        self._scratch = scratch_folder(folder, "inputs")
        self._generator = torch.Generator().manual_seed(seed)
        self._gradients: list[Tensor] = []  # of the loss, at the output of the block to come
        # float16 gradients of single tokens vanish; bfloat16 and float32 have the range
        self._scale = 1024.0 if dtype_of(model) == torch.float16 else 1.0
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def __enter__(self) -> _Backward:
        self.model.requires_grad_(False)
        try:
            self.stream.check(example(self.model, self.batches[0]))
            self._forward()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.let_go()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._scratch.cleanup()

    def step(self, block: int, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Yield for each batch the inputs and output gradients of the linears called `names`.

        Blocks must be taken from the last to the first, each to the end.
        """
        inputs, place = load_file(self._inputs(block)), self.stream.place
        for b in range(len(self.batches)):
            coming = place.on_device(self._gradients[b])
            hidden = inputs.pop(str(b)).to(coming.device).requires_grad_()
            with _outputs(self.model, names) as seen, torch.enable_grad():
                out = self.stream.run_block(block, hidden, self.batches[b])
            outputs = [y for _, y in seen.values()]
            gone, *found = torch.autograd.grad(out, [hidden, *outputs], coming, allow_unused=True)
            self._gradients[b] = place.let_rest(gone)
            yield {
                name: (x.detach(), g.float() / self._scale)
                for (name, (x, _)), g in zip(seen.items(), found, strict=True)
                if g is not None
            }

    def end(self) -> None:
        """Let the recorder see the gradients at the input of the first block."""
        assert self._recorder is not None
        for ids, gradient in zip(self.batches, self._gradients, strict=True):
            self._recorder.embedding(self.stream, ids, gradient, self._scale)

    def vision(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return G of the linears called `names` in the vision tower, once the first block is done.

        Zeros where nothing depends on one: LLaVA leaves out the last block of its tower.
        """
        moments: dict[str, Moment] = {}
        for ids, gradient in zip(self.batches, self._gradients, strict=True):
            with _outputs(self.model, names) as seen, torch.enable_grad():
                hidden = self.stream.embed(ids)
            outputs = [y for _, y in seen.values()]
            if not outputs or not hidden.requires_grad:
                continue  # no image
            coming = self.stream.place.on_device(gradient)
            found = torch.autograd.grad(hidden, outputs, coming, allow_unused=True)
            for name, y, g in zip(seen, outputs, found, strict=True):
                g = torch.zeros_like(y) if g is None else g
                moments.setdefault(name, Moment(g, torch.float32)).add(g.float() / self._scale)
        for moment in moments.values():
            moment.n_tokens = self.n_losses
        return {name: moment.gram() for name, moment in moments.items()}

    @torch.no_grad()
    def _forward(self) -> None:
        """Put the input of each block on disk, and the gradients at the last output in memory."""
        rest = self.stream.place.let_rest
        hidden = [rest(self.stream.embed(ids)) for ids in self.batches]
        for block in range(self.stream.n_blocks):
            save_file({str(b): h.contiguous() for b, h in enumerate(hidden)}, self._inputs(block))
            hidden = [
                rest(self.stream.run_block(block, h, ids))
                for ids, h in zip(self.batches, hidden, strict=True)
            ]
        for ids, last in zip(self.batches, hidden, strict=True):
            parts = [
                self._head_gradient(i, h) for i, h in zip(ids.split(1), last.split(1), strict=True)
            ]
            self._gradients.append(rest(torch.cat(parts)))

    def _head_gradient(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the gradient of -sum log p(y), y sampled from p, at the last block's output.

        ids (1, seq), hidden (1, seq, dim). Some positions at a time: logits are large.
        """
        step = hidden.shape[1] if self.kind.is_pooled else _HEAD_POSITIONS
        parts = zip(ids.split(step, dim=1), hidden.split(step, dim=1), strict=True)
        return torch.cat([self._part_gradient(*part) for part in parts], dim=1)

    def _part_gradient(self, ids: Tensor, hidden: Tensor) -> Tensor:
        if not n_text(self.model, ids):
            return torch.zeros_like(hidden)  # all of one image
        watching = self._recorder.watching() if self._recorder else nullcontext()
        with torch.enable_grad(), watching:
            hidden = self.stream.place.on_device(hidden.detach()).requires_grad_()
            logits = self.stream.head(*only_text(self.model, ids, hidden)).flatten(0, 1).float()
            if self.kind.is_vector:
                return self._vector_gradient(logits, hidden)
            with torch.no_grad():
                # on the CPU, in order of tokens: the same labels on any device and batch size;
                # with replacement as that takes one random number each, not one per column
                p, generator = logits.softmax(-1).cpu(), self._generator
                labels = torch.multinomial(p, 1, replacement=True, generator=generator)[:, 0]
            if self._recorder:
                self._recorder.head(logits, p)
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss * self._scale, hidden)
        return gradient

    def _vector_gradient(self, vectors: Tensor, hidden: Tensor) -> Tensor:
        """Return the gradient of r . v, r a normal vector: 1 - cos grows by half its square."""
        r = torch.randn(vectors.shape, generator=self._generator).to(vectors.device)
        (gradient,) = torch.autograd.grad((vectors * r).sum() * self._scale, hidden)
        return gradient

    def _inputs(self, block: int) -> Path:
        return Path(self._scratch.name) / f"{block:05d}.safetensors"


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield a dict that a forward fills with (input, output) of the linears called `names`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str):  # type: ignore[no-untyped-def]
        def noted(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()  # a vision tower has nothing before it that does
            seen[name] = (args[0], output)

        return noted

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _by_block(units: Sequence[Unit]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for unit in units:
        found.setdefault(unit.block, []).append(unit.name)
    return found


def _file(root: Path, block: int) -> Path:
    return root / f"block_{block:05d}.safetensors"


def _write(path: Path, moments: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name in names:
        if name not in moments:
            raise ValueError(f"the loss does not depend on {name}: skip it, or use more tokens")
        if not bool(moments[name].isfinite().all()):
            raise ValueError(
                f"the output gradients of {name} hold inf or NaN: load the model in bfloat16 or "
                "float32 and check its weights"
            )
    with atomic_path(path) as temporary:
        save_file({name: G.cpu().contiguous() for name, G in moments.items()}, temporary)
