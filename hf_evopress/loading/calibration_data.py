"""The calibration data that EvoPressConfig names, for a dense model that is being loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..calibration.class_tokens import class_tokens
from ..calibration.transcripts import read_sounds
from ..models.classes import class_of, set_pooling
from ..models.images import give_images
from ..models.pooling import pooling_said
from ..models.source import check_context, is_decoder, read_tokenizer
from .config import EvoPressConfig


def read(model: Any, config: EvoPressConfig) -> Tensor:
    """Return token sequences (n, seq), as the class of `model` knows them.

    A speech recogniser is given their sounds as well, an embedding model how it pools.
    """
    sources = [config.data] if isinstance(config.data, str) else list(config.data or ())
    name, n = model.config.name_or_path, config.n_sequences
    cut: dict[str, Any] = {"seq_len": config.seq_len, "seed": config.seed}
    kind = class_of(model)
    if kind.hears:
        sounds = read_sounds(name, model.config, sources, **cut)
        give_images(model, sounds.images)
        return sounds.write(n)
    if kind.is_vector:  # levels that are felt by outputs are felt by the vector
        set_pooling(model, pooling_said(name, is_decoder(model.config)))
    check_context(model.config, config.seq_len, "seq_len")
    words = read_tokenizer(name)
    return class_tokens(sources, words, kind, n_sequences=n, column=config.column, **cut)
