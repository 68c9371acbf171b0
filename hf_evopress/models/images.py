"""Images among the tokens of a vision-language model, found again by the tokens around them.

Everything here works on rows of token ids. What a processor made of the images of one row (pixels,
sizes) is a file, named by a fingerprint of the row, and a model that was given the folder takes it
along whenever that whole row goes in. Places of images are tokens like any other to calibration;
what counts for a loss is what the model says at text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.fingerprint import tensor_fingerprint
from ..base.reading import reading
from ..base.resources import atomic_path

TYPES = ("token_type_ids", "mm_token_type_ids")  # of tokens, that a forward may take
_ATTRIBUTE = "_evopress_images"
_PADDED = "pixel_attention_mask"  # of processors whose pixels are (text, image, ...): Idefics kin


class Images:
    """A folder of processor outputs by row of token ids; token: the id at places of an image."""

    what = "images"
    in_masks = True  # whether masks and positions of blocks depend on them

    def __init__(self, folder: str | Path, token: int) -> None:
        self.folder, self.token = Path(folder), token

    @property
    def fingerprint(self) -> str:
        """What the images were made from, as the folder's name says."""
        return self.folder.name

    def add(self, row: Tensor, inputs: Sequence[dict[str, Tensor]]) -> None:
        """Keep what a processor made of the images in `row` (seq,), in their order."""
        if inputs:
            with atomic_path(self._file(row)) as temporary:
                save_file(_side_by_side(inputs), temporary)

    def of(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what a forward takes beside ids (batch, seq); nothing for rows without images."""
        found = []
        for row in ids:
            if self.has_places(row) and self._file(row).is_file():
                with reading(self._file(row), way_out="delete it and the tokens beside it"):
                    found.append(load_file(self._file(row)))
        return _one_after_the_other(found)

    def has_places(self, row: Tensor) -> bool:
        """Return whether there are places of images in a row."""
        return bool((row == self.token).any())

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError where the images of rows (n, seq) are not there."""
        for row in tokens:
            if self.has_places(row) and not self._file(row).is_file():
                raise ValueError(
                    f"{self.folder} lacks the {self.what} of tokens that were kept beside it: "
                    "delete the folder tokens/ next to it, and both are made anew"
                )

    def types(self, ids: Tensor, *, of_prefix: bool = False) -> Tensor:
        """Return the types of tokens ids (batch, seq): 1 at the places of images, 0 at text.

        of_prefix: the other way round. PaliGemma's 0 is what is seen from both sides, the images
        and, in training, the question behind them, which is not told from an answer here.
        """
        return ((ids == self.token) != of_prefix).long()

    def text(self, row: Tensor) -> Tensor:
        """Return the positions of a row (seq,) that are no places of images."""
        return (row != self.token).nonzero()[:, 0]

    def counted(self, row: Tensor) -> Tensor:
        """Return which rows of the outputs for a row (seq,) count."""
        return self.text(row)

    def _file(self, row: Tensor) -> Path:
        return self.folder / f"{tensor_fingerprint(row.cpu().contiguous())}.safetensors"


def give_images(model: Any, images: Images | None) -> None:
    """Have a model take along the images of the rows that go in."""
    model.__dict__[_ATTRIBUTE] = images


def images_of(model: Any) -> Images | None:
    """Return the images that a model was given."""
    found: Images | None = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    return found


def only_text(model: Any, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids (1, t) and hidden states (1, t, dim) at the text of one row, for the head."""
    images = images_of(model)
    if images is None or not images.has_places(ids[0]):
        return ids, hidden
    kept = images.text(ids[0])
    return ids[:, kept], hidden[:, kept.to(hidden.device)]


def n_text(model: Any, tokens: Tensor) -> int:
    """Return how many of tokens (n, seq) are text."""
    images = images_of(model)
    return tokens.numel() if images is None else sum(len(images.text(row)) for row in tokens)


def example(model: Any, tokens: Tensor) -> Tensor:
    """Return what to try a model on: the start of a sequence, or all of one with an image."""
    images = images_of(model)
    with_image = [] if images is None else [i for i, r in enumerate(tokens) if images.has_places(r)]
    return tokens[with_image[:1]] if with_image else tokens[:1, :8]


def made_from(model: Any) -> dict[str, str]:
    """Return what decides the images, to go into the fingerprint of what is made with them."""
    images = images_of(model)
    return {} if images is None else {"images": images.fingerprint}


def _side_by_side(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the images of several texts as those of one."""
    dim = 1 if _PADDED in inputs[0] else 0
    return {k: torch.cat([one[k] for one in inputs], dim).contiguous() for k in inputs[0]}


def _one_after_the_other(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the images of several rows as a batch."""
    if not rows:
        return {}
    made = {}
    for key in rows[0]:
        parts = [row[key] for row in rows]
        if _PADDED in rows[0]:  # as many images per row: empty ones are not looked at
            most = max(part.shape[1] for part in parts)
            parts = [F.pad(p, (*[0, 0] * (p.ndim - 2), 0, most - p.shape[1])) for p in parts]
        made[key] = torch.cat(parts)
    return made
