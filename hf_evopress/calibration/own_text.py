"""Text sampled from the dense model itself, as additional calibration and training data.

Beginnings are continued by tokens drawn from the model's own distribution, nothing cut off:
LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 3.1). What a compressed model has to keep is
this distribution, and there is as much of it as one has time for, while a calibration text of 100
sequences is soon learnt by heart. Beginnings are, where there is a text at hand, a few tokens from
anywhere in it (`write_sequences`); without any (`write_self`), the part of the chat template that
comes before what a user says, so that the model asks as well as answers (Magpie: Xu et al. 2024,
arXiv:2406.08464), one random token, or the prompts of a file, under the chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from ..base.fingerprint import claim, model_fingerprint, tensor_fingerprint
from ..base.placement import dtype_of
from ..base.plugins import did_you_mean
from ..base.progress import Progress
from ..base.reading import ANEW, reading
from ..base.resources import atomic_path
from ..models.kv_cache import cache_argument
from ..models.stream import BlockStream
from .input_moments import check_tokens
from .text import CHAT, OWN, RAW, SELF, bos_of, prompts_file

logger = logging.getLogger(__name__)

START = 16  # tokens of the text that a sequence begins with, at most half of it
_BATCH_TOKENS = 65536  # written side by side, fewer where their keys and values take more than
_CACHE_BYTES = 2 * 2**30
_TELL = 16  # tokens between two reports of progress


def write_sequences(
    model: Any,
    tokens: Tensor,
    n_sequences: int,
    folder: str | Path,
    *,
    bos: Sequence[int] = (),
    start: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Return (n_sequences, seq_len) int64 that `model` wrote, kept in `folder`.

    tokens (n, seq_len): how long they are, and where the first `start` tokens (by default 16)
    are from. bos: what each begins with, if anything. Batches that are there are not written
    again. Raises ValueError where `folder` holds those of another model, text or seed.
    """
    check_tokens(tokens, model.get_input_embeddings().weight.shape[0])
    seq_len = tokens.shape[1]
    start = min(START, seq_len // 2) if start is None else start
    if not len(bos) < start < seq_len:
        raise ValueError(
            f"start must be in {len(bos) + 1} .. {seq_len - 1}, below seq_len; got {start}"
        )
    made_from = {
        "model": model_fingerprint(model),
        "tokens": tensor_fingerprint(tokens),
        "shape": [n_sequences, seq_len],
        "start": [start, *bos],
        "seed": seed,
    }
    claim(Path(folder), made_from, what="text written by a model")
    starts = _starts(tokens, n_sequences, start, bos, seed)
    return _kept(model, starts, seq_len, Path(folder), seed, progress)


def write_self(
    model: Any,
    tokenizer: Any,
    n_sequences: int,
    folder: str | Path,
    *,
    kind: str = SELF,
    seq_len: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Return (n_sequences, seq_len) int64 that `model` wrote without any text, kept in `folder`.

    kind: one of `text.OWN`. `self:chat` begins with the tokenizer's chat template up to what the
    user says, and needs a template; `self:raw` with one random token (after BOS, where the
    tokenizer adds it); `self` is the first where there is a template, else the second; self:FILE
    begins with the prompts of a file, one after the other.
    """
    if (file := prompts_file(kind)) is not None:
        begins = [_asked(tokenizer, prompt) for prompt in prompts(file)]
        if len(begins) != n_sequences:
            logger.warning(
                "%s has %d prompts for %d sequences: %s", file, len(begins), n_sequences,
                "some are asked more than once" if len(begins) < n_sequences else "the last ones "
                "are not asked",
            )  # fmt: skip
        begins = [begins[i % len(begins)] for i in range(n_sequences)]
        return _answers(model, begins, Path(folder), seq_len, seed, progress)
    begin = chat_prefix(tokenizer) if kind != RAW else []
    if kind == CHAT and not begin:
        raise ValueError(
            "self:chat needs a tokenizer whose chat template begins with a user's turn, and this "
            "one has none: take self:raw"
        )
    if len(begin) >= seq_len:
        raise ValueError(f"the chat template alone takes {len(begin)} of {seq_len} tokens")
    made_from = {
        "model": model_fingerprint(model),
        "shape": [n_sequences, seq_len],
        "begins with": begin or "a random token",
        "seed": seed,
    }
    claim(Path(folder), made_from, what="text written by a model")
    if begin:
        starts = torch.tensor([begin] * n_sequences, dtype=torch.long)
    else:
        starts = _random_starts(model, tokenizer, n_sequences, seed)
    return _kept(model, starts, seq_len, Path(folder), seed, progress)


def prompts(file: Path) -> list[str]:
    """Return the lines of a file that are not blank; raises errors that name it without any."""
    if not file.is_file():
        near = did_you_mean(f"self:{file}", [*OWN])
        raise FileNotFoundError(f"no file {file} (in {Path.cwd()}) to take prompts from{near}")
    with reading(file):
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{file} holds no prompts: it is text, one prompt a line")
    return [line for line in lines if line]


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt, as what a user says where there is a chat template."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return bos_of(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses the prompt {prompt!r} ({error}); take the prompts as plain "
            "text (--data FILE), or --data self:raw"
        ) from error
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _answers(
    model: Any,
    begins: Sequence[list[int]],
    folder: Path,
    seq_len: int,
    seed: int,
    progress: Progress | None,
) -> Tensor:
    """Return (n, seq_len): each beginning continued, those of one length side by side."""
    if (longest := max(map(len, begins))) >= seq_len:
        raise ValueError(
            f"a prompt alone takes {longest} of {seq_len} tokens: shorten it, or take longer "
            "sequences (--seq-len)"
        )
    starts = [torch.tensor(begin, dtype=torch.long) for begin in begins]
    made_from = {
        "model": model_fingerprint(model),
        "shape": [len(begins), seq_len],
        "begins with": [tensor_fingerprint(torch.cat(starts)), *map(len, begins)],
        "seed": seed,
    }
    claim(folder, made_from, what="text written by a model")
    written = torch.empty(len(begins), seq_len, dtype=torch.long)
    lengths = sorted({*map(len, begins)})
    for number, length in enumerate(lengths):

        def tell(what: str, done: int, total: int, before: int = number) -> None:
            if progress:
                progress(what, 100 * before + 100 * done // total, 100 * len(lengths))

        mine = [i for i, begin in enumerate(begins) if len(begin) == length]
        alike, own = torch.stack([starts[i] for i in mine]), folder / f"begun_{length:05d}"
        written[mine] = _kept(model, alike, seq_len, own, seed + length, tell)
    return written


def chat_prefix(tokenizer: Any) -> list[int]:
    """Return the tokens of the chat template before a user's words; [] where there is none."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return []
    words = "zq user words qz"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
    except TemplateError:
        return []
    before, found, _ = text.partition(words)
    return tokenizer(before, add_special_tokens=False)["input_ids"] if found else []


def _random_starts(model: Any, tokenizer: Any, n: int, seed: int) -> Tensor:
    """Return (n, 1 or 2) int64: a random token each, none special, after BOS if texts have it."""
    size = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = torch.tensor([i for i in range(size) if i not in special], dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    first = known[torch.randint(len(known), (n, 1), generator=generator)]
    bos = torch.tensor([bos_of(tokenizer)] * n, dtype=torch.long)
    return torch.cat([bos, first], dim=1)


def _kept(
    model: Any,
    starts: Tensor,
    seq_len: int,
    folder: Path,
    seed: int,
    progress: Progress | None,
) -> Tensor:
    """Return starts (n, start) continued to seq_len tokens, batch by batch, kept in `folder`."""
    parts = starts.split(_batch(model, seq_len))
    made = []
    for number, part in enumerate(parts):

        def tell(position: int, before: int = number * seq_len) -> None:
            if progress and (position % _TELL == 0 or position == seq_len):
                progress("write", before + position, len(parts) * seq_len)

        file = folder / f"written_{number:05d}.safetensors"
        if not file.is_file():
            with BlockStream(model).whole():
                ids = _continued(model, part.to(model.device), seq_len, seed + number, tell)
            with atomic_path(file) as temporary:
                save_file({"input_ids": ids.int().cpu()}, temporary)
        with reading(file, way_out=ANEW):
            made.append(load_file(file)["input_ids"].long())
    return torch.cat(made)


def _batch(model: Any, seq_len: int) -> int:
    """Return how many sequences are written side by side."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    position = 2 * config.num_hidden_layers * heads * width * dtype_of(model).itemsize
    return max(1, min(_BATCH_TOKENS, _CACHE_BYTES // position) // seq_len)


def _starts(tokens: Tensor, n: int, length: int, bos: Sequence[int], seed: int) -> Tensor:
    """Return (n, length) pieces of random sequences, from random places."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(tokens), (n, 1), generator=generator)
    first = torch.randint(tokens.shape[1] - length + 1, (n, 1), generator=generator)
    made = tokens[rows, first + torch.arange(length)]
    made[:, : len(bos)] = torch.tensor(bos, dtype=torch.long)
    return made


@torch.no_grad()
def _continued(
    model: Any, starts: Tensor, seq_len: int, seed: int, tell: Callable[[int], None]
) -> Tensor:
    with torch.random.fork_rng(), _plain_generation(model):
        torch.manual_seed(seed)
        return model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            max_length=seq_len,
            do_sample=True,
            top_k=0,  # the default is 50
            stopping_criteria=[_Never(tell)],
            **{cache_argument(model): _cache(model, seq_len)},
        )


def _cache(model: Any, length: int) -> DynamicCache | None:
    """Return a cache that has room for `length` positions, None where a model's is of its own."""
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [
        _Roomy(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class _Roomy(DynamicLayer):
    """Keys and values written into memory taken once: grown, all are copied at each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [_room(t, self.length) for t in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        return self.keys, self.values


def _room(states: Tensor, length: int) -> Tensor:
    return states.new_empty(*states.shape[:-2], length, states.shape[-1])


class _Never(StoppingCriteria):
    """Stops no sequence, and tells how long they are."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        self.tell(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Let `model` draw from its own distribution: no penalties, temperature or end of its config.

    A text that ends is followed by what the model puts after an end, as in training.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
