"""EvoPressConfig: what config.json says about a compressed model, and how to load it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..base.plugins import did_you_mean
from ..base.reading import reading
from ..base.resources import parse_size
from ..base.version import __version__
from ..plans.plan import Plan
from .runtimes import AUTO, RUNTIMES

QUANT_METHOD = "evopress"
RUNTIME_VARIABLE = "HF_EVOPRESS_RUNTIME"
FORMAT_VERSION = 1  # of the checkpoint: what config.json and the safetensors files hold

_STORED = ("plan", "checksums", "format_version", "written_by", "quant_method")
_LOADING = (
    "data",
    "column",
    "n_sequences",
    "seq_len",
    "seed",
    "dequantize",
    "verify",
    "runtime",
    "size",
)


class EvoPressConfig(QuantizationConfigMixin):
    """The quantization config of a compressed model.

    plan: a Plan, its dict, or where one is: a file, a folder, or a Hub repository, with
        "@revision" behind it if need be. config.json holds it inline.
    checksums: tensor name in the file -> CRC-32, written by save_pretrained and checked by
        from_pretrained.

    The others matter while loading and are not written to config.json:
    data: text files or datasets to calibrate on, for a dense model and levels such as gptq (for a
        speech recogniser JSON lines with sounds, see `calibration.transcripts`);
        n_sequences, seq_len and seed say how much is read, column where tables have their text.
    dequantize: return the stock dense model with the compressed model's weights.
    verify: compare the files with their checksums (about 2 GB/s).
    runtime: "auto", the fastest way that holds the packed tensors only. "packed" does as well, and
        computes a weight whenever its layer is called: the reference, slow. "expanded" also holds
        every weight in the dtype of the model: memory of the dense model and the checkpoint,
        speed of the dense model. "int4" also holds codes for PyTorch's int4 kernel on CPUs.
        "triton" is "auto" on a GPU, and refused where Triton cannot be had.
        runtimes.py says more. What save_pretrained writes is the same. Where none is given, the
        environment variable HF_EVOPRESS_RUNTIME names one, else it is "auto".
    size: of a model of many sizes (`hf-evopress stack`), how many bytes its tensors may take, such
        as "80MB"; of a folder's file no other block is read. transformers downloads a model on the
        Hub whole before this is looked at: `AutoModel*.from_pretrained(name, size="80MB")` and
        `hf_evopress.download` fetch no other block. `model.resize` changes the size later.

    It is not frozen, because transformers sets loading attributes on it.

    >>> AutoModelForCausalLM.from_pretrained("me/dense", quantization_config=EvoPressConfig(
    ...     plan="me/smol-3.3bit", data="text.txt"))
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Any] | str | Path | None = None,
        *,
        data: str | Sequence[str] | None = None,
        column: str = "text",
        n_sequences: int = 128,
        seq_len: int = 1024,
        seed: int = 0,
        dequantize: bool = False,
        verify: bool = True,
        runtime: str | None = None,
        size: str | int | None = None,
        checksums: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        written_by: str | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method is {QUANT_METHOD!r}, got {quant_method!r}")
        _check_version(format_version, written_by)
        for key in unknown:
            known = [*_STORED, *_LOADING]
            raise ValueError(f"EvoPressConfig has no option {key!r}{did_you_mean(key, known)}")
        self.quant_method = QUANT_METHOD
        self.plan = None if plan is None else _read_plan(plan)
        self.data, self.column = data, column
        self.n_sequences, self.seq_len, self.seed = n_sequences, seq_len, seed
        self.dequantize, self.verify = dequantize, verify
        self.runtime = runtime or _usual_runtime()
        self.size = size
        if not isinstance(checksums or {}, Mapping):
            raise TypeError(
                f"checksums are an object of tensor names and hex digits, got {checksums!r:.200}"
            )
        self.checksums = dict(checksums or {})
        self.requested_plan: Plan | None = None
        self._check_values()

    def _check_values(self) -> None:
        for key in ("n_sequences", "seq_len"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key} must be a whole number above 0, got {value!r}")
        for key in ("dequantize", "verify"):
            if type(getattr(self, key)) is not bool:
                raise TypeError(f"{key} must be true or false, got {getattr(self, key)!r}")
        if self.size is not None:
            parse_size(self.size)
        if not isinstance(self.runtime, str) or self.runtime not in RUNTIMES:
            raise ValueError(
                f"no runtime {self.runtime!r}{did_you_mean(str(self.runtime), list(RUNTIMES))}"
            )
        for name, checksum in self.checksums.items():
            if not isinstance(checksum, str) or len(checksum) != 8:
                raise ValueError(f"checksum of {name} must be 8 hex digits, got {checksum!r:.200}")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what config.json says under quantization_config; errors name both."""
        _usual_runtime()  # what is wrong with that is not the file's fault
        with reading("quantization_config in config.json"):
            if not all(isinstance(key, str) for key in config_dict):
                raise TypeError(f"keys are text, got {[*config_dict]!r:.200}")
            return super().from_dict(config_dict, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds, as JSON values; loading attributes are left out."""
        values: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "written_by": __version__,
            "plan": None if self.plan is None else self.plan.to_short_dict(),
        }
        if self.checksums:
            values["checksums"] = dict(sorted(self.checksums.items()))
        return values

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a config passed to from_pretrained changes on a compressed model's own.

        transformers asks for it, keeps the model's plan and says so in a warning only;
        `requested_plan` lets the quantizer refuse a plan that is not the model's.
        """
        return {**{key: getattr(self, key) for key in _LOADING}, "requested_plan": self.plan}

    def __deepcopy__(self, memo: Any) -> EvoPressConfig:
        made: EvoPressConfig = object.__new__(type(self))
        for name, value in self.__dict__.items():  # none holds what can be changed, deeper down
            kind = type(value)
            setattr(made, name, kind(value) if kind in (dict, list) else value)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EvoPressConfig) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.plan, self.dequantize))


def _usual_runtime() -> str:
    """Return the runtime that the environment names, else the default."""
    name = os.environ.get(RUNTIME_VARIABLE) or AUTO
    if name not in RUNTIMES:
        hint = did_you_mean(name, list(RUNTIMES))
        raise ValueError(f"environment variable {RUNTIME_VARIABLE}: no runtime {name!r}{hint}")
    return name


def _check_version(version: Any, written_by: str | None) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version must be a whole number above 0, got {version!r}")
    if version > FORMAT_VERSION:
        wanted = f'"hf-evopress>={written_by}"' if written_by else "--upgrade hf-evopress"
        raise ValueError(
            f"the checkpoint has format_version {version}, written by hf-evopress "
            f"{written_by or 'of a later version'}; hf-evopress {__version__} reads up to "
            f"{FORMAT_VERSION}: pip install {wanted}"
        )


def _read_plan(source: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """Return the plan that `source` is or names."""
    if isinstance(source, Plan):
        return source
    if isinstance(source, Mapping):
        with reading("plan"):
            return Plan.from_dict(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"plan is a Plan, a dict, a path or a Hub repository, got {type(source).__name__}"
        )
    return Plan.from_pretrained(source)
