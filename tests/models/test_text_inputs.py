"""Models that need an image, or read no text, are refused before anything is loaded."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_evopress.models.text_inputs import check_reads_text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ViTModel", "reads pixel_values"),
        ("CLIPModel", "has no embedding of tokens for itself"),
        ("BlipForConditionalGeneration", "asks for pixel_values in each forward"),
        ("BertModel", None),
    ],
)
def test_what_a_forward_needs_decides(name: str, why: str | None) -> None:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    if why is None:
        check_reads_text(model)
        return
    message = f"{name} {why}: it does not run on a text alone, .*EvoPressConfig"
    with pytest.raises(ValueError, match=message):
        check_reads_text(model)
