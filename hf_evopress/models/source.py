"""The model that a name stands for: its config, its tokenizer and its weights, all checked.

What transformers answers with a warning, with another file's name or at the end of a run is an
error here, at once: a folder that is none, a class whose head would be lost, weights that the
checkpoint lacks or that are not numbers, text longer than the context.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import is_torchvision_available

from ..base.own_code import is_trusted
from ..base.reading import reading
from ..plans.repo import is_repo_id
from .classes import (
    CAUSAL,
    CLASSES,
    MASKED,
    SEQ2SEQ,
    SPEECH,
    ModelClass,
    class_of,
    find_class,
    start_of,
)
from .file_checks import check_config, check_index
from .units import SUPPORTED

_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = "evopress"


def read_config(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool | None = None
) -> Any:
    """Return the config of a model, a folder or a Hub name; errors name the way out.

    trust_remote_code: here and below, None is what the job says (`base.own_code`).
    """
    _check_place(name)
    if (file := Path(name) / "config.json").is_file():
        try:
            check_config(file)
        except (ValueError, TypeError) as error:
            raise type(error)(f"the config of {name} cannot be read: {error}") from error
    try:
        with reading(file):
            return AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=_may_run(trust_remote_code)
            )
    except OSError as error:
        raise type(error)(_no_model(name, error)) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{file}: {name} brings code of its own, which would run here: read it, then say "
            "--trust-remote-code (trust_remote_code: true in a recipe, trust_remote_code=True in "
            "Python)"
        ) from error


def read_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    **file: Any,
) -> Any:
    """Return the tokenizer of a model; ValueError where its folder has none."""
    if not file:
        _check_place(name)
    folder = Path(name)
    if folder.is_dir() and not file and not _has_tokenizer(folder):
        raise ValueError(
            f"{name} holds a model and no tokenizer: copy tokenizer.json and "
            "tokenizer_config.json of the model that it comes from into it"
        )
    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=_may_run(trust_remote_code), **file
    )


def read_processor(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool | None = None
) -> Any:
    """Return the processor of a vision-language model; ValueError where it has none."""
    try:
        made = AutoProcessor.from_pretrained(
            name, revision=revision, trust_remote_code=_may_run(trust_remote_code)
        )
    except (OSError, ValueError, ImportError, AttributeError) as error:  # of placeholders
        more = "" if is_torchvision_available() else "; some need `pip install torchvision`"
        raise ValueError(f"{name} has no processor that can be loaded: {error}{more}") from error
    if not hasattr(made, "image_processor") or getattr(made, "image_token_id", None) is None:
        raise ValueError(
            f"{name} has no processor of images: copy preprocessor_config.json and "
            "processor_config.json of the model that it comes from into it"
        )
    if not getattr(made, "chat_template", None):
        raise ValueError(f"the processor of {name} has no chat template for conversations")
    return made


def read_extractor(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool | None = None
) -> Any:
    """Return the feature extractor of a speech recogniser; ValueError where it has none."""
    try:
        made = AutoFeatureExtractor.from_pretrained(
            name, revision=revision, trust_remote_code=_may_run(trust_remote_code)
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name} has no feature extractor that can be loaded: {error}") from error
    if not hasattr(made, "hop_length") or not hasattr(made, "sampling_rate"):
        raise ValueError(
            f"{name} has a {type(made).__name__}, which makes no spectrogram of sound: copy "
            "preprocessor_config.json of the model that it comes from into it"
        )
    return made


def load_checked(name: str | Path, *, kind: ModelClass | None = None, **options: Any) -> Any:
    """Return the model called `name`, after checking class, keys and values.

    kind: its class; a causal language model where none is given. options: as of from_pretrained.
    Checkpoints of other quantizers are left to them.
    """
    if kind is None and "gguf_file" not in options:
        asked = {k: options[k] for k in ("revision", "trust_remote_code") if k in options}
        check_class(read_config(name, **asked), name)
    if "gguf_file" not in options:
        check_index(Path(name) / "model.safetensors.index.json")
    options = {"output_loading_info": True, "trust_remote_code": is_trusted(), **options}
    with reading(name):
        loaded = (kind or CAUSAL).loader.from_pretrained(name, **options)
    model, info = loaded
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(method, "quant_method", _OURS) == _OURS:
        _check_keys(name, type(model).__name__, info)
        check_finite(model, str(name))
    return model


def kind_of(config: Any, name: str | Path) -> ModelClass:
    """Return the class of a checkpoint; ValueError names what is supported nearest."""
    if getattr(config, "is_encoder_decoder", False):
        return _encoder_decoder(config, name)
    auto_map = getattr(config, "auto_map", None) or {}
    for kind in CLASSES:
        if kind.auto in auto_map:
            return kind
    for architecture in getattr(config, "architectures", None) or ():
        found = find_class(architecture)
        if found is not None and not found.has_encoder:  # of those, models of sound
            if found is CAUSAL:
                check_class(config, name)
            return found
    check_class(config, name)
    return CAUSAL


def _encoder_decoder(config: Any, name: str | Path) -> ModelClass:
    """Return the class of an encoder-decoder that is known; ValueError for one of another kind."""
    for said in getattr(config, "architectures", None) or ():
        if (kind := find_class(said)) in (SEQ2SEQ, SPEECH):
            start_of(config, str(name))
            return kind
    made = getattr(transformers, _said(config), None)
    reads = getattr(made, "main_input_name", "input_ids")
    why = "with a head of another kind" if reads == "input_ids" else f"which reads {reads}, no text"
    raise ValueError(
        f"{name} is a {_said(config)}, an encoder-decoder {why}; supported of those are the "
        "T5ForConditionalGeneration, BartForConditionalGeneration and other classes of "
        f"AutoModelForSeq2SeqLM, and of sound WhisperForConditionalGeneration; besides, {SUPPORTED}"
    )


def check_head(name: str | Path, skeleton: Any) -> None:
    """Raise ValueError where a folder's weights lack the head of the model: it would be random.

    A head may be stored by another name, as that of GPT-NeoX is: where a tensor of its shape is
    there that the model does not know, loading says whether it is one.
    """
    stored, own = _stored_shapes(Path(name)), skeleton.state_dict()
    prefix, tied = f"{skeleton.base_model_prefix}.", getattr(skeleton, "all_tied_weights_keys", {})
    if not stored or not any(key.startswith(prefix) for key in own):
        return
    others = {shape for k, shape in stored.items() if k not in own and f"{prefix}{k}" not in own}
    for key, tensor in own.items():
        part = key.partition(".")[0]
        # anywhere in a name: some checkpoints are stored by other paths than they have in memory
        if key.startswith(prefix) or key in tied or any(f".{part}." in f".{k}." for k in stored):
            continue
        if tuple(tensor.shape) in others:
            continue
        raise ValueError(
            f"{name} has no {key}: its {type(skeleton).__name__} would get a random head; give the "
            "fine-tuned checkpoint, or correct architectures in its config.json"
        )


def sees_ahead(model: Any) -> bool:
    """Return whether a position depends on those behind it, as in an encoder."""
    kind = class_of(model)
    if kind.has_encoder:
        return True
    return not kind.generates and (kind is MASKED or not is_decoder(model.config))


def is_decoder(config: Any) -> bool:
    """Return whether a config is of a model whose tokens see only those before them."""
    text = config.get_text_config(decoder=True)
    mapping: Any = AutoModelForCausalLM._model_mapping
    known = next((kind for kind in type(text).__mro__ if kind in mapping), None)
    if known is None or getattr(text, "use_bidirectional_attention", False):
        return False
    made = mapping[known]
    is_encoder = _is_encoder(made[0] if isinstance(made, (list, tuple)) else made)
    return bool(getattr(text, "is_decoder", False)) or not is_encoder


def check_class(config: Any, name: str | Path) -> None:
    """Raise ValueError unless the checkpoint is of the causal language model of its config."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    if CAUSAL.auto in (getattr(config, "auto_map", None) or {}):
        return  # of its own code
    if type(config) not in mapping:
        raise ValueError(
            f"{name} is a {_said(config)}, which is no causal language model; supported"
            f"{_kin(config)}{SUPPORTED}"
        )
    made = mapping[type(config)]
    classes = made if isinstance(made, (list, tuple)) else (made,)
    known = [kind.__name__ for kind in classes]
    saved = [a for a in getattr(config, "architectures", None) or () if hasattr(transformers, a)]
    if saved and not set(saved) & set(known):
        raise ValueError(
            f"{name} is a {saved[0]}, of which a causal language model would lose or lack the "
            f"head; supported{_kin(config)}{SUPPORTED}"
        )
    if getattr(config, "is_decoder", None) is False and _is_encoder(classes[0]):
        raise ValueError(
            f"{name} is a {known[0]} with is_decoder=false, an encoder in which every token sees "
            f"those behind it; supported: {SUPPORTED}"
        )


def _kin(config: Any) -> str:
    """Return which classes of a config's own kind can be compressed, before what else can."""
    names = []
    for kind in CLASSES:
        mapping: Any = kind.loader._model_mapping
        made = mapping.get(type(config), ())
        classes = made if isinstance(made, (list, tuple)) else (made,)
        names += [c.__name__ for c in classes if c.main_input_name == "input_ids"]  # not of images
    names = [name for name in names if name != _said(config)]
    return f" of its kind: {', '.join(dict.fromkeys(names))}; besides, " if names else ": "


def check_finite(model: nn.Module, name: str) -> None:
    """Raise ValueError that names the weights of `model` that hold NaN or infinity."""
    wrong = [n for n, p in model.named_parameters() if not is_finite(p)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{name} holds NaN or infinity in {', '.join(wrong[:4])}{more}: the checkpoint is "
            "damaged, or was saved in float16, which overflows; download it again"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are numbers; what is not in memory counts as if they were."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() > 1 and bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
        return True  # one pass, no memory; a sum that overflows is looked at closely
    return bool(torch.isfinite(tensor.detach().to(torch.float32)).all())


def context_of(config: Any) -> int | None:
    """Return the most tokens that a model takes, None where its config does not say."""
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if "roberta" in config.model_type and isinstance(longest, int):
        longest -= (config.pad_token_id or 0) + 1  # its positions begin behind the padding's
    return longest if isinstance(longest, int) and longest > 0 else None


def check_context(config: Any, n_tokens: int, what: str) -> None:
    """Raise ValueError where sequences of `n_tokens` are longer than the model's context."""
    longest = context_of(config)
    if longest is not None and n_tokens > longest:
        raise ValueError(f"{what} {n_tokens} is longer than the model's context of {longest}")


def window_of(config: Any, window: int | None, *, default: int = 2048) -> int:
    """Return the tokens per window: what was asked, else `default` or the model's context."""
    if window is None:
        return min(default, context_of(config) or default)
    check_context(config, window, "window")
    return window


def _check_keys(name: str | Path, kind: str, info: Any) -> None:
    parts = {
        "lacks": [*info["missing_keys"]],
        "has, and the model has no place for,": [*info["unexpected_keys"]],
        "has in another shape": [str(key[0]) for key in info["mismatched_keys"]],
    }
    for what, keys in parts.items():
        if keys:
            more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
            raise ValueError(
                f"{name} does not fit {kind}: the checkpoint {what} "
                f"{', '.join(sorted(keys)[:6])}{more}; supported: {SUPPORTED}"
            )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in a folder's safetensors files, none of other files."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):  # loading will say what is wrong with it
            return {}
    return shapes


def _may_run(said: bool | None) -> bool:
    """Return whether a model's own code may run."""
    return is_trusted() if said is None else said


def _said(config: Any) -> str:
    architectures = getattr(config, "architectures", None)
    return architectures[0] if architectures else f"model of type {config.model_type!r}"


def _is_encoder(kind: type) -> bool:
    """Return whether a class needs is_decoder=True to be causal, as its own file says."""
    return "add `is_decoder=True" in inspect.getsource(sys.modules[kind.__module__])


def _check_place(name: str | Path) -> None:
    """Raise an error for a name that is neither a model's folder nor could be one on the Hub."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the folder of a model")
    has_config, is_adapter = (folder / "config.json").is_file(), (folder / _ADAPTER).is_file()
    if folder.is_dir() and is_adapter and has_config:
        raise ValueError(
            f"{name} holds a model and an adapter, and transformers would load another model, "
            f"the base that {_ADAPTER} names: move {_ADAPTER} and {_ADAPTER_WEIGHTS} to a folder "
            "of their own"
        )
    if folder.is_dir() and is_adapter:
        raise ValueError(
            f"{name} is an adapter, not a model: give the model that {_ADAPTER} names as its base, "
            "or merge the two first (hf-evopress merge, or PEFT's merge_and_unload)"
        )
    if folder.is_dir() and not has_config:
        raise FileNotFoundError(f"the folder {name} holds no config.json, so no model")
    if not folder.is_dir() and not is_repo_id(str(name)):
        raise FileNotFoundError(f"there is no folder {name} (in {Path.cwd()})")


def _no_model(name: str | Path, error: OSError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if Path(name).is_dir():
        return f"the config of {name} cannot be read: {lines[0] if lines else error}"
    return (
        f"there is no folder {name} (in {Path.cwd()}), and the Hub gives no model of that name: "
        f"{lines[0] if lines else type(error).__name__}"
    )


def _has_tokenizer(folder: Path) -> bool:
    ends = ("tokenizer.json", "tokenizer_config.json", ".model", "vocab.json", "vocab.txt")
    more = ("tekken.json", ".tiktoken")
    return any(p.name.endswith((*ends, *more)) for p in folder.iterdir())
