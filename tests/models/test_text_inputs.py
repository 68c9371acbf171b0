"""Models of images or of pairs are no embedding models of texts, and are refused as such."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_evopress.models.text_inputs import check_reads_text


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vit", "ViTModel reads pixel_values: it is no embedding model of texts"),
        ("clip", "CLIPModel has no embedding of tokens for itself: .*EvoPressConfig"),
        ("bert", None),
    ],
)
def test_what_a_headless_model_reads_decides(kind: str, message: str | None) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind))
    if message is None:
        check_reads_text(model)
        return
    with pytest.raises(ValueError, match=message):
        check_reads_text(model)
