"""Which class of model a checkpoint is of: the Auto class that loads it, and what it puts out.

The class comes from the checkpoint's own `architectures`, so that a head is never lost or made up.
What a model puts out is brought to one form, (batch, rows, columns), whose rows are what a fitness
compares: next tokens, masked tokens, labels of tokens, labels of a text, the places where an answer
starts and ends, or one vector per text.

An encoder-decoder gets sequences in two halves: the first is the source, which the encoder reads,
the rest the target, which the decoder predicts token by token; its rows are those of the target.
Where the source is sound (see `sounds`), its places come first, and all behind them is the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ..base.placement import place_of
from .images import TYPES, images_of, n_text
from .sounds import features, n_places


@dataclass(frozen=True)
class ModelClass:
    """One kind of model. The columns of its outputs are log-odds, but those of a vector."""

    name: str  # as the library's tasks are called
    auto: str  # class of transformers
    what: str  # in a sentence of the card
    task: str  # pipeline tag of the Hub
    generates: bool = False
    is_pooled: bool = False  # a few rows per text instead of one per token
    is_vector: bool = False
    has_encoder: bool = False  # of its own, before the decoder: rows of the target only
    hears: bool = False  # sound, which its encoder reads in place of tokens
    model_types: tuple[str, ...] = ()  # where not all that the Auto class loads are of it

    @property
    def continues_text(self) -> bool:
        """Whether there is one row per token, of what comes next."""
        return self.generates and not self.has_encoder

    @property
    def n_texts(self) -> int:
        """How many texts a sequence is, begun and ended as the tokenizer does; 0 for a piece."""
        return 2 if self.has_encoder else 0 if self.generates else 1

    @property
    def loader(self) -> Any:
        """The Auto class."""
        return getattr(transformers, self.auto)


CAUSAL = ModelClass(
    "causal", "AutoModelForCausalLM", "A language model", "text-generation", generates=True
)
IMAGE_TEXT = ModelClass(
    "image-text", "AutoModelForImageTextToText", "A vision-language model, its text part",
    "image-text-to-text", generates=True,
)  # fmt: skip
AUDIO_TEXT = ModelClass(
    "audio-text", "AutoModelForMultimodalLM", "An audio language model, its text part",
    "audio-text-to-text", generates=True,
)  # fmt: skip
SEQ2SEQ = ModelClass(
    "seq2seq", "AutoModelForSeq2SeqLM", "An encoder-decoder", "text2text-generation",
    generates=True, is_pooled=True, has_encoder=True,
)  # fmt: skip
SPEECH = ModelClass(
    "speech", "AutoModelForSpeechSeq2Seq", "A speech recogniser", "automatic-speech-recognition",
    generates=True, is_pooled=True, has_encoder=True, hears=True, model_types=("whisper",),
)  # fmt: skip
MASKED = ModelClass("masked", "AutoModelForMaskedLM", "A masked language model", "fill-mask")
TOKENS = ModelClass(
    "tokens", "AutoModelForTokenClassification", "A classifier of tokens", "token-classification"
)
SEQUENCE = ModelClass(
    "sequence", "AutoModelForSequenceClassification", "A classifier of texts",
    "text-classification", is_pooled=True,
)  # fmt: skip
ANSWERS = ModelClass(
    "answers", "AutoModelForQuestionAnswering", "A model that finds answers in a text",
    "question-answering", is_pooled=True,
)  # fmt: skip
HEADLESS = ModelClass(
    "headless", "AutoModel", "An embedding model", "feature-extraction",
    is_pooled=True, is_vector=True,
)  # fmt: skip

CLASSES = (
    *(CAUSAL, IMAGE_TEXT, AUDIO_TEXT, SEQ2SEQ, SPEECH),
    *(MASKED, TOKENS, SEQUENCE, ANSWERS, HEADLESS),
)
BY_NAME: Mapping[str, ModelClass] = MappingProxyType({kind.name: kind for kind in CLASSES})
POOLINGS = ("mean", "first", "last")


@lru_cache(maxsize=None)
def find_class(architecture: str) -> ModelClass | None:
    """Return the class of a model called such as BertForMaskedLM, None where there is none here."""
    return next((kind for kind in CLASSES if _lists(kind, architecture)), None)


def takes_images(config: Any) -> bool:
    """Return whether a model of this config takes images; its class may be causal (Gemma 3)."""
    return any(_lists(IMAGE_TEXT, name) for name in getattr(config, "architectures", None) or ())


def _lists(kind: ModelClass, architecture: str) -> bool:
    mapping: Any = kind.loader._model_mapping
    return any(
        architecture == made or (isinstance(made, tuple) and architecture in made)
        for model_type, made in mapping._model_mapping.items()
        if not kind.model_types or model_type in kind.model_types
    )


def class_of(model: Any) -> ModelClass:
    """Return the class of a model that is there: causal, where transformers does not know it."""
    return find_class(type(model).__name__) or find_class(_stock_name(model)) or CAUSAL


def _stock_name(model: Any) -> str:
    return next((c.__name__ for c in type(model).__mro__ if find_class(c.__name__)), "")


def outputs(model: Any, out: Any, ids: Tensor, *, pooling: str = "mean") -> Tensor:
    """Return what a forward put out as (batch, rows, columns).

    pooling: how a headless model's states become one vector per text: mean, first or last.
    """
    kind = class_of(model)
    if kind is ANSWERS:
        return torch.stack([out.start_logits, out.end_logits], dim=1)
    if kind is HEADLESS:
        return pooled(out[0], pooling)
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits[:, None] if kind is SEQUENCE else logits


def pooled(states: Tensor, pooling: str) -> Tensor:
    """Return one vector of length 1 per text (batch, 1, dim), of states (batch, seq, dim)."""
    if pooling == "mean":
        states = states.mean(1, keepdim=True)
    else:
        states = states[:, :1] if pooling == "first" else states[:, -1:]
    return F.normalize(states, dim=-1)


def call(model: Any, ids: Tensor, *, with_images: bool = True) -> Tensor:
    """Return the outputs of a model for token ids (batch, seq) without padding.

    with_images: take along the images of rows, where the model was given some (see `images`).
    """
    out = forward(model, ids, with_images=with_images)
    return outputs(model, out, ids, pooling=pooling_of(model))


def forward(model: Any, ids: Tensor, *, with_images: bool = True) -> Any:
    """Return what a model's forward returns, with no cache made where it would make one."""
    options: dict[str, Any] = {"use_cache": False} if _takes_cache(model) else {}
    if class_of(model).has_encoder:
        options["decoder_input_ids"] = _decoder_ids(model, ids)
        return model(**source_of(model, ids, with_sound=with_images), **options)
    images = images_of(model) if with_images else None
    if images is not None:
        place = place_of(model)
        dtype = place.dtype or model.dtype
        found = images.of(ids)
        for key, value in found.items():
            options[key] = value.to(ids.device, dtype if value.is_floating_point() else None)
        if found:  # what decides masks and positions of some, as their processors have it
            known = inspect.signature(type(model).forward).parameters
            of_prefix = model.config.model_type == "paligemma"
            types = images.types(ids, of_prefix=of_prefix)
            options |= {key: types for key in TYPES if key in known}
    return model(input_ids=ids, **options)


def n_source(model: Any, n_tokens: int) -> int:
    """Return how many tokens of a sequence are the source of an encoder-decoder."""
    return n_places(model) if class_of(model).hears else n_tokens // 2


def source_of(model: Any, ids: Tensor, *, with_sound: bool = True) -> dict[str, Tensor]:
    """Return what the encoder of an encoder-decoder reads of ids (batch, seq)."""
    if class_of(model).hears:
        return {"input_features": features(model, ids, with_sound=with_sound)}
    return {"input_ids": ids[:, : n_source(model, ids.shape[1])]}


def embedded(model: Any, ids: Tensor) -> Tensor:
    """Return the tokens that the input embedding looks up for ids (batch, seq)."""
    return _decoder_ids(model, ids) if class_of(model).hears else ids


def _decoder_ids(model: Any, ids: Tensor) -> Tensor:
    target = ids[:, n_source(model, ids.shape[1]) :]
    return shifted(target, start_of(model.config, type(model).__name__))


def text_length(model: Any, tokens: Tensor) -> int:
    """Return how many of each of tokens (n, seq) are no places of sound."""
    return tokens.shape[1] - (n_places(model) if class_of(model).hears else 0)


def n_losses(model: Any, tokens: Tensor) -> int:
    """Return how many rows of tokens (n, seq) have a loss; two of an answer count as one."""
    kind = class_of(model)
    if kind.has_encoder:
        return n_text(model, tokens) - len(tokens) * n_source(model, tokens.shape[1])
    return len(tokens) if kind.is_pooled else n_text(model, tokens)


def shifted(target: Tensor, start: int) -> Tensor:
    """Return what the decoder reads to predict `target` (batch, seq): one token later."""
    return torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)


def start_of(config: Any, name: str) -> int:
    """Return the token that the decoder of an encoder-decoder starts with."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{name} has no decoder_start_token_id, with which its decoder would start: set it in "
            "config.json, to the token of the target language or to the one that generate() starts "
            "with"
        )
    return int(start)


def pooling_of(model: Any) -> str:
    """Return how the states of a headless model are pooled: as `set_pooling` said, else mean."""
    return str(model.__dict__.get("_evopress_pooling", "mean"))


def set_pooling(model: Any, pooling: str) -> None:
    """Say how the states of a headless model become one vector: mean, first or last."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {', '.join(POOLINGS)}, got {pooling!r}")
    model.__dict__["_evopress_pooling"] = pooling


def _takes_cache(model: Any) -> bool:
    """Return whether a forward takes use_cache, by name or for a decoder inside it."""
    parameters = inspect.signature(type(model).forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    text = model.config.get_text_config(decoder=True)
    return "use_cache" in parameters or (passes_on and hasattr(text, "use_cache"))
