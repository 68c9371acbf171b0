"""Sound that a speech recogniser hears, found again by the row of token ids that it belongs to.

A row is first the places of the sound, as many as the encoder puts out states, then the words. The
places hold a fingerprint of the sound, so that the same words said twice are two rows. Rows are of
one length: behind the end of the words they begin again, which no loss counts. What a feature
extractor made of the sound is kept and given to a model as images are (see `images`).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..base.placement import place_of
from .images import Images, images_of

KEY = "input_features"
_STRIDE = 2  # of the encoder's second convolution: frames for each place


class Sounds(Images):
    """A folder of sounds by row of token ids; end: the token behind the words.

    fingerprint: what the sounds were made from, a folder in `folder`; without one it is gone with
    this object.
    """

    what = "sounds"
    in_masks = False  # all are of one length

    def __init__(
        self, folder: str | Path | None, fingerprint: str, *, n_places: int, end: int
    ) -> None:
        if folder is None:
            self._scratch = TemporaryDirectory(prefix="evopress-")
            folder = self._scratch.name
        super().__init__(Path(folder) / fingerprint, end)
        self.n_places = n_places

    def has_places(self, row: Tensor) -> bool:
        """Return whether there is sound in a row: there is in each."""
        return True

    def text(self, row: Tensor) -> Tensor:
        """Return the positions of a row (seq,) up to the end of its words."""
        ends = (row[self.n_places :] == self.token).nonzero()[:, 0]
        n = self.n_places + int(ends[0]) + 1 if len(ends) else len(row)
        return torch.arange(n, device=row.device)

    def counted(self, row: Tensor) -> Tensor:
        """Return which rows of the outputs for a row (seq,) count: those of words."""
        return self.text(row)[: -self.n_places]


def places_for(fingerprint: str, n_places: int) -> list[int]:
    """Return token ids at the places of a sound: the hexadecimal digits of its fingerprint."""
    digits = [int(digit, 16) for digit in fingerprint[:n_places]]
    return digits + [0] * (n_places - len(digits))


def n_places(model: Any) -> int:
    """Return how many states the encoder of a speech recogniser puts out."""
    return int(model.config.max_source_positions)


def features(model: Any, ids: Tensor, *, with_sound: bool = True) -> Tensor:
    """Return what the encoder reads for rows ids (batch, seq); silence for those without sound."""
    sounds = images_of(model) if with_sound else None
    silence = torch.zeros(1, model.config.num_mel_bins, _STRIDE * n_places(model))
    found = [{} if sounds is None else sounds.of(row[None]) for row in ids]
    made = torch.cat([one.get(KEY, silence) for one in found])
    return made.to(ids.device, place_of(model).dtype or model.dtype)
