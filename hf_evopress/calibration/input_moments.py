"""Second moments of the inputs of every unit, in one pass over calibration tokens.

The model is streamed block by block: hidden states of all tokens at one block, and the moments
of one block, are all that is in memory. One file per block, whole or absent, so that a killed
run resumes at the next block.

Activations at position 0 depend on the first token only (causality), so their second moment
comes from a few sequences of length 1. It is what makes calibration see attention sinks.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.fingerprint import claim, model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.progress import Progress
from ..base.ranks import ALONE, Ranks
from ..base.reading import ANEW, reading
from ..base.resources import atomic_path
from ..methods.maths.linalg import Stats
from ..models import images
from ..models.ends import output_head
from ..models.experts import others
from ..models.head import head_inputs
from ..models.images import example
from ..models.source import sees_ahead
from ..models.stream import BlockStream
from ..models.two_stacks import stream_of
from ..models.units import Unit, find_units
from ..models.vision import BLOCK as VISION
from .end_moments import HEAD_FILE, STATS

logger = logging.getLogger(__name__)

Group = tuple[str, ...]  # names of units that share one input

FOLDER = STATS
_BATCH_TOKENS = 4096


def calibrate(
    model: nn.Module,
    tokens: Tensor,
    folder: str | Path,
    *,
    units: Sequence[Unit] | None = None,
    heldout_tokens: Tensor | None = None,
    prefix: Sequence[int] | None = None,
    n_sink: int = 64,
    accumulate: torch.dtype = torch.float32,
    batch_tokens: int = _BATCH_TOKENS,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Path:
    """Return `folder`/stats after writing the moments of every block that is not there yet.

    tokens, heldout_tokens (n_sequences, seq_len) int64; the latter give a second Gram, to score
    levels on text that did not make them. prefix: token ids with which every use of the model
    starts (a chat template): the sink moment is then taken over all its positions, otherwise over
    position 0 of `n_sink` likely first tokens, and not at all where tokens see those behind.
    accumulate: dtype of the sums. ranks: processes that share the folder; each takes the moments of
    its blocks.
    Raises ValueError where the folder holds moments made from something else.
    """
    units = list(units) if units is not None else find_units(model)
    needs_head = ranks.is_first and any(unit.role in ("head", "tied") for unit in units)
    units = [unit for unit in units if not unit.is_end]  # see `end_moments`
    sets = _token_sets(model, tokens, heldout_tokens, prefix, n_sink)
    root = Path(folder) / FOLDER
    with ranks.first_alone():
        claim(root, _made_from(model, units, sets, accumulate), what="calibration statistics")
    by_block: dict[int, list[str]] = {}
    for unit in units:
        by_block.setdefault(unit.block, []).append(unit.name)
    mine = [i for n, i in enumerate(sorted(by_block)) if ranks.owns(n)]
    missing = [i for i in mine if not _file(root, i).is_file()]
    needs_head = needs_head and not (root / HEAD_FILE).is_file()
    if not missing and not needs_head:
        ranks.wait()
        return root
    stream = stream_of(model)
    stream.check(example(model, tokens))
    with torch.no_grad(), stream:
        if VISION in missing:
            _write_vision(_file(root, VISION), stream, sets, by_block[VISION], batch_tokens)
        runs = {k: _Run(stream, ids, batch_tokens) for k, ids in sets.items()}
        n_blocks = stream.n_blocks if needs_head else max(0, missing[-1] + 1)
        for i in range(n_blocks):
            if i in missing:
                _write_block(_file(root, i), runs, i, by_block[i], accumulate)
            else:
                for run in runs.values():
                    run.advance(i)
            if progress:
                progress("calibration", i + 1, n_blocks)
        if needs_head:
            _write_head(root / HEAD_FILE, runs["gram"])
    ranks.wait()
    return root


def load_stats(folder: str | Path, block: int) -> dict[str, Stats]:
    """Return the statistics of the units of one block; units with one input share one Stats."""
    path = _file(Path(folder) / FOLDER, block)
    if not path.is_file():
        raise FileNotFoundError(f"no calibration statistics at {path}: run calibrate first")
    result = {}
    with reading(path, way_out=ANEW), safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for g, group in enumerate(json.loads(file.metadata()["groups"])):
            tensors = {
                name: file.get_tensor(f"{g}.{name}")
                for name in ("gram", "sink", "mean", "heldout")
                if f"{g}.{name}" in keys
            }
            stats = Stats(**tensors, n_tokens=group["n_tokens"])
            result.update(dict.fromkeys(group["units"], stats))
    return result


class Moment:
    """Running sums of x and x x^T of one input."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        n = x.shape[-1]
        self.total = torch.zeros(n, n, dtype=dtype, device=x.device)
        self.sum = torch.zeros(n, dtype=torch.float64, device=x.device)
        self.n_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of x (..., in). Only the upper triangle of the total is kept up to date."""
        X = x.reshape(-1, x.shape[-1]).float()
        n = X.shape[1]
        # x x^T is symmetric: four strips from the diagonal rightwards are 5/8 of the products
        width = -(-n // 4) if n >= 256 else n
        for start in range(0, n, width):
            left, right = X[:, start : start + width], X[:, start:]
            into = self.total[start : start + width, start:]
            if into.dtype == torch.float32:
                into.addmm_(left.T, right)
            else:
                into += left.T @ right
        self.sum += X.sum(0)  # float64 only across batches: a float64 reduction is 10x slower
        self.n_tokens += len(X)

    @classmethod
    def pooled(cls, moments: Sequence[Moment]) -> Moment:
        """Return the moments of all that was added to any of `moments`."""
        made = copy.copy(moments[0])
        made.total = torch.stack([m.total for m in moments]).sum(0)
        made.sum = torch.stack([m.sum for m in moments]).sum(0)
        made.n_tokens = sum(m.n_tokens for m in moments)
        return made

    def gram(self) -> Tensor:
        """Return the mean of x x^T, (in, in) float32."""
        upper = self.total.triu()
        return ((upper + upper.triu(1).T) / self.n_tokens).float()

    def mean(self) -> Tensor:
        """Return the mean of x, (in,) float32."""
        return (self.sum / self.n_tokens).float()


def _lend(made: dict[Group, Moment], names: Sequence[str]) -> None:
    """Give experts that no token went to the moments of the other experts of their block."""
    seen = {name: moment for group, moment in made.items() for name in group}
    for name in names:
        if name not in seen and (lenders := others(name, seen)):
            made[(name,)] = Moment.pooled([seen[lender] for lender in lenders])
            logger.warning("no token went to %s: it takes the statistics of the others", name)


class _Run:
    """One set of sequences on its way through the blocks."""

    def __init__(self, stream: BlockStream, ids: Tensor, batch_tokens: int) -> None:
        self.stream = stream
        size = max(1, batch_tokens // ids.shape[1])
        self.ids = ids.split(size)
        self.hidden = [stream.place.let_rest(stream.embed(part)) for part in self.ids]

    def advance(self, block: int) -> None:
        """Run one block over all sequences, in place."""
        for b, hidden in enumerate(self.hidden):
            self.hidden[b] = self._run(block, hidden, self.ids[b])

    def moments(self, block: int, names: Sequence[str], dtype: torch.dtype) -> dict[Group, Moment]:
        """Run one block over all sequences and return the moments of its distinct inputs."""
        made: dict[Group, Moment] = {}
        with unit_inputs(self.stream.model, names) as seen:
            for b, hidden in enumerate(self.hidden):
                seen.clear()
                self.hidden[b] = self._run(block, hidden, self.ids[b])
                for group, x in distinct_inputs(seen):
                    if group not in made:
                        made[group] = Moment(x, dtype)
                    made[group].add(x)
        return made

    def _run(self, block: int, hidden: Tensor, ids: Tensor) -> Tensor:
        return self.stream.place.let_rest(self.stream.run_block(block, hidden, ids))


def _write_block(
    path: Path, runs: dict[str, _Run], block: int, names: list[str], accumulate: torch.dtype
) -> None:
    """Run one block over all sets of sequences, and write the moments of its inputs."""
    made = {
        k: run.moments(block, names, accumulate if k == "gram" else torch.float32)
        for k, run in runs.items()
    }
    _lend(made["gram"], names)
    _write(path, made, names)


def _write_vision(
    path: Path, stream: BlockStream, sets: dict[str, Tensor], names: list[str], batch_tokens: int
) -> None:
    """Run the vision tower over the images among the sequences, and write its inputs' moments."""
    if stream.adds_between:
        raise ValueError(
            f"{type(stream.model).__name__} reads its vision tower between its blocks as well, "
            "which levels there would change: leave out --vision"
        )
    made: dict[str, dict[Group, Moment]] = {}
    for kind in (kind for kind in ("gram", "heldout") if kind in sets):
        for ids in sets[kind].split(max(1, batch_tokens // sets[kind].shape[1])):
            with unit_inputs(stream.model, names) as seen:
                stream.embed(ids)
            for group, x in distinct_inputs(seen):
                made.setdefault(kind, {}).setdefault(group, Moment(x, torch.float32)).add(x)
    if "gram" not in made:
        raise ValueError("the calibration text has no images for the vision tower: give more")
    _write(path, made, names)


def _write_head(path: Path, run: _Run) -> None:
    """Write the moment of the head's inputs, when all blocks have been run."""
    found = output_head(run.stream.model)
    if found is None:
        return
    moment: Moment | None = None
    for ids, hidden in zip(run.ids, run.hidden, strict=True):
        x = head_inputs(found[1], run.stream, ids, hidden)
        moment = moment or Moment(x, torch.float32)
        moment.add(x)
    assert moment is not None  # there are tokens
    with atomic_path(path) as temporary:
        save_file({"gram": moment.gram().cpu()}, temporary)


@contextmanager
def unit_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that every forward fills with the inputs of the linears called `names`."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = args[0] if args else kwargs["input"]

        return noted

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distinct_inputs(seen: dict[str, Tensor]) -> Iterator[tuple[Group, Tensor]]:
    """Yield each distinct input once with the names of the units that read it.

    Two live tensors with the same storage address, shape and strides are the same numbers.
    """
    groups: dict[Any, list[str]] = {}
    for name, x in seen.items():
        if not x.numel():  # an expert that no token went to
            continue
        groups.setdefault((x.data_ptr(), tuple(x.shape), x.stride(), x.dtype), []).append(name)
    for names in groups.values():
        yield tuple(names), seen[names[0]]


def _token_sets(
    model: nn.Module,
    tokens: Tensor,
    heldout: Tensor | None,
    prefix: Sequence[int] | None,
    n_sink: int,
) -> dict[str, Tensor]:
    """Return what to run for each moment: "gram", "sink" and perhaps "heldout"."""
    n_vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    check_tokens(tokens, n_vocab)
    sets = {"gram": tokens}
    if prefix is not None and len(prefix):
        sets["sink"] = torch.tensor([list(prefix)], dtype=torch.long)
    elif n_sink and not sees_ahead(model):
        sets["sink"] = first_tokens(tokens, n_sink)[:, None]
    if heldout is not None and len(heldout):
        sets["heldout"] = heldout
    for ids in sets.values():
        check_tokens(ids, n_vocab)
    return sets


def check_tokens(tokens: Tensor, n_vocab: int) -> None:
    """Raise ValueError where `tokens` are no (n_sequences, seq_len) int64 below `n_vocab`."""
    if tokens.ndim != 2 or tokens.dtype != torch.long or not tokens.numel():
        raise ValueError(
            "tokens are a LongTensor (n_sequences, seq_len) with at least one token, got "
            f"{tuple(tokens.shape)} {tokens.dtype}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= n_vocab:
        raise ValueError(
            f"token ids run from {low} to {high}, the model has {n_vocab} embeddings: "
            "use the model's own tokenizer"
        )


def first_tokens(tokens: Tensor, n: int) -> Tensor:
    """Return up to `n` distinct tokens with which a sequence is likely to start, (<= n,) int64.

    Where all sequences start with the same token (BOS), it alone; otherwise the first tokens by
    frequency, topped up with the most frequent tokens of the text.
    """
    firsts = Counter(tokens[:, 0].tolist())
    if len(firsts) == 1 and len(tokens) > 1:
        return tokens[:1, 0].clone()
    values, counts = tokens.unique(return_counts=True)
    everywhere = values[counts.argsort(descending=True, stable=True)].tolist()
    chosen = dict.fromkeys([t for t, _ in firsts.most_common(n)] + everywhere)
    return torch.tensor(list(chosen)[:n], dtype=torch.long)


def _made_from(
    model: nn.Module, units: Sequence[Unit], sets: dict[str, Tensor], accumulate: torch.dtype
) -> dict[str, Any]:
    names = {"gram": "tokens", "sink": "first tokens", "heldout": "held-out tokens"}
    return {
        "model": model_fingerprint(model),
        "units": text_fingerprint(*(unit.name for unit in units)),
        "accumulate": str(accumulate).removeprefix("torch."),
        **images.made_from(model),
        **{names[k]: tensor_fingerprint(sets[k]) if k in sets else None for k in names},
    }


def _file(root: Path, block: int) -> Path:
    return root / f"block_{block:05d}.safetensors"


def _write(path: Path, made: dict[str, dict[Group, Moment]], names: Sequence[str]) -> None:
    """Write the moments of one block; every unit must belong to one group."""
    grams = made["gram"]
    counts = Counter(name for group in grams for name in group)
    for name in names:
        if counts[name] != 1:
            problem = "was never run" if not counts[name] else "shares its input only at times"
            raise ValueError(f"{name} {problem} during calibration: use more tokens or skip it")
    tensors: dict[str, Tensor] = {}
    groups = []
    for g, (group, moment) in enumerate(grams.items()):
        groups.append({"units": list(group), "n_tokens": moment.n_tokens})
        tensors[f"{g}.gram"], tensors[f"{g}.mean"] = moment.gram(), moment.mean()
        for kind in ("sink", "heldout"):
            if group in made.get(kind, {}):
                tensors[f"{g}.{kind}"] = made[kind][group].gram()
        if not all(bool(t.isfinite().all()) for k, t in tensors.items() if k.startswith(f"{g}.")):
            raise ValueError(
                f"the inputs of {', '.join(group)} hold inf or NaN during calibration: load the "
                "model in bfloat16 or float32 and check its weights"
            )
    with atomic_path(path) as temporary:
        tensors = {k: t.cpu().contiguous() for k, t in tensors.items()}
        save_file(tensors, temporary, metadata={"groups": json.dumps(groups)})
