"""EvoPressQuantizer: how transformers loads, saves and dequantizes compressed models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import compose
from ..models.dropped import replace_dropped, restore_zero, sentinel_keys
from ..models.ends import ends_of
from ..models.experts import SplitExperts
from ..models.images import give_images
from ..models.plain import make_stock, match_plan
from ..models.size import NOTICE
from ..plans.block_order import has_order
from ..plans.level import DENSE, Level
from ..plans.plan import Plan
from ..store.checksums import verify_tensors
from ..store.header import entries_of
from .ahead import read_ahead, show_again
from .blocks import Stack, cut
from .checks import (
    check_levels_match,
    check_loaded,
    check_shapes,
    checksums_of_written,
    never_saved,
)
from .config import QUANT_METHOD, EvoPressConfig
from .embedding import finish_loading
from .file_names import apart, names_of, write_apart
from .layers import (
    compressed_layers,
    packed_names,
    planned_levels,
    prepare_layers,
    resolve_units,
    zero_missing_biases,
)
from .neighbours import left_out, refuse_shared, share
from .replace import replace, restore_linears
from .runtimes import check_runtime
from .unexpected import ignore_keys
from .versions import AnyHfQuantizer, Dtypes, dtypes_of, settle_dtypes

logger = logging.getLogger(__name__)


class EvoPressQuantizer(AnyHfQuantizer):
    """The bridge that transformers calls; users meet it as `model.hf_quantizer`.

    A compressed checkpoint: planned linear layers are replaced on the meta device, so that the
    packed tensors load by name and no dense weight ever exists. A dense checkpoint with
    EvoPressConfig(plan=...): levels that need no data are compressed weight by weight while
    loading, others after loading, calibrated on `data`.
    """

    quantization_config: EvoPressConfig

    def __init__(self, quantization_config: EvoPressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._on_load: dict[str, Level] = {}  # parameter name -> level, of a dense checkpoint
        self._compresses_after = False  # a dense checkpoint: not on load but once it is there
        self._tokens: Tensor | None = None
        self._dtypes: Dtypes = {}
        self._splits_experts = False  # the model has experts whose layers are apart
        self._packed: list[str] = []  # names of its packed tensors
        self.stack: Stack | None = None  # where blocks come from, of a model of many sizes

    # -- before the weights --------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work; transformers calls this before anything is read."""
        config = self.quantization_config
        if config.plan is None and config.size is not None:
            raise ValueError(
                f"size={config.size!r} is of a model of many sizes, and this one is dense: "
                "`hf-evopress stack` makes one of it"
            )
        if config.plan is None:
            raise ValueError(
                "EvoPressConfig has no plan, as argument or in config.json: pass "
                "EvoPressConfig(plan=...), or load a model that is already compressed"
            )
        if config.requested_plan is not None and config.requested_plan != config.plan:
            raise ValueError(
                "the model is already compressed with another plan; to apply "
                "EvoPressConfig(plan=...), start from the dense model "
                f"({config.plan.base_model or 'it is not named in the plan'})"
            )
        if self.pre_quantized:
            return
        if config.size is not None:
            raise ValueError(
                "size is for models of many sizes (`hf-evopress stack`); this one is dense"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "a model cannot be compressed and offloaded to disk at once; compress it, "
                "save it, and load the result with this device_map"
            )
        refuse_shared(config.plan)
        if config.data is None and (levels := _calibrated(config.plan)):
            raise ValueError(
                f"levels {', '.join(levels)} need calibration data: pass "
                "EvoPressConfig(plan=..., data='text.txt'), or a plan with levels such as rtn"
            )

    def check_parallel(self, config: Any) -> None:
        """Refuse tensor parallelism: packed tensors cannot be cut along their rows yet."""
        settings = getattr(config, "distributed_config", None)
        for key in ("tp_size", "ep_size"):
            size = getattr(settings, key, None) or 1
            if size > 1:
                raise ValueError(
                    f"compressed models cannot be loaded with {key}={size}; use device_map, "
                    "data parallelism, or dequantize() first"
                )

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        check_runtime(config.runtime, model.dtype)
        plan = _plan_of(config)
        match_plan(model, plan)
        levels = planned_levels(model, plan)
        if not self.pre_quantized:
            if plan.base_model != model.config.name_or_path:
                plan.check_depth(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
            self._prepare_compression(model, plan, levels)
            self.look_at(model)
            return
        ignore_keys(model, [NOTICE, *(f"{path}." for path in replace_dropped(model, plan))])
        files = [str(f) for f in checkpoint_files or () if str(f).endswith(".safetensors")]
        for name, level in levels.items():
            replace(model, name, level)
        share(model, compressed_layers(model))
        self.look_at(model)
        tensors = [entry for file in files for entry in entries_of(file)]
        written = {entry.name for entry in tensors}
        names = names_of(model, written, config.checksums, quantizer=self)
        checksums = {names.of_file(name): value for name, value in config.checksums.items()}
        skipped = self._cut(model, plan, Stack(plan, tuple(files), checksums, names.in_model))
        if config.verify and checksums and files:
            left_out = map(names.of_file, [*skipped, *never_saved(model)])
            verify_tensors(tensors, checksums, left_out=set(left_out))
        check_shapes(model, tensors, names)
        self._dtypes = dtypes_of(model)
        read = [] if skipped else read_ahead(model, tensors, names, kwargs.get("device_map"))
        ignore_keys(model, [*(f"{name}.weight" for name in levels), *skipped, *read])

    def _cut(self, model: Any, plan: Plan, stack: Stack) -> list[str]:
        """Note where blocks come from, and leave out those that a size has no room for.

        Returns the names of the tensors that are not loaded.
        """
        config = self.quantization_config
        if has_order(plan):
            self.stack = stack
        if config.size is None:
            return []
        config.plan, left_out = cut(model, plan, config.size)
        return left_out

    def look_at(self, model: nn.Module) -> None:
        """Note what `conversions` has to know of the model, which early versions do not pass."""
        self._splits_experts = any(isinstance(module, SplitExperts) for module in model.modules())
        self._packed = packed_names(model)

    def _prepare_compression(self, model: Any, plan: Plan, levels: dict[str, Level]) -> None:
        was_plain = make_stock(model)  # as the dense checkpoint is
        self._compresses_after = was_plain or bool(_calibrated(plan))
        if not self._compresses_after:
            ignore_keys(model, [f"{path}." for path in replace_dropped(model, plan)])
            self._on_load = {f"{name}.weight": level for name, level in levels.items()}
            return
        if not _calibrated(plan):
            return
        # Statistics are those of the dense model, so nothing is compressed while loading. The
        # data is read first: it should fail before the weights are loaded, not after.
        read = import_module("hf_evopress.loading.calibration_data").read
        with torch.device("cpu"):  # transformers builds models inside torch.device("meta")
            self._tokens = read(model, self.quantization_config)

    # -- while the weights are loaded ----------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return whether `param_name` is a dense weight to be compressed while loading."""
        return param_name in self._on_load

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes per element that `device_map="auto"` plans with: the packed size."""
        if param_name in self._on_load:
            shape = (param.shape[0], param.shape[1])
            return compose.cost_bits(self._on_load[param_name], shape) / 8 / param.numel()
        return float(param.element_size())

    def conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Leave out what merges experts where they are apart, or packed tensors."""
        return apart(weight_conversions, self._packed, experts=self._splits_experts)

    def get_quantize_ops(self) -> Any:
        """Return the operation that compresses one dense weight."""
        from .compress_on_load import CompressOnLoad

        return CompressOnLoad(self._on_load)

    # -- after the weights ---------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        show_again(model)
        if not self._compresses_after:  # biases of layers that are dense yet are initialized
            zero_missing_biases(model)
        if not self.pre_quantized:
            from ..models.source import check_finite

            check_finite(model, model.config.name_or_path)
            config.plan = _plan_of(config).applied_to(model.config)
        if self._compresses_after:
            stitch = import_module("hf_evopress.loading.stitch")
            stitch.compress_model(model, _plan_of(config), self._tokens)
            self._tokens = None
            give_images(model, None)
        self.look_at(model)
        model.register_load_state_dict_pre_hook(_without_notice)
        settle_dtypes(model, self._dtypes)
        finish_loading(model)
        check_loaded(model, _plan_of(config))
        for layer in compressed_layers(model).values():
            for tensor in layer.state.values():
                tensor.requires_grad_(False)  # the loader gives every float tensor a gradient
        config.requested_plan = None
        if config.dequantize:
            self._dequantize(model, None)
            self.remove_quantization_config(model)
        else:
            prepare_layers(model, config.runtime)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """Make `model` forget that it was compressed: what is saved next is a stock checkpoint."""
        super().remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore_linears(model)
        restore_zero(model)
        make_stock(model)
        if isinstance(dtype, str):  # save_pretrained leaves the config with a word
            dtype = getattr(torch, dtype)
        if dtype is not None and dtype != model.dtype:
            model.to(dtype)
        return model

    # -- saving and training -------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict]:
        """Return what save_pretrained writes, after noting its checksums in the config.

        For each compressed layer there is an empty tensor `<layer>.weight`, about 100 bytes of
        header: without hf_evopress, transformers would load the folder with random weights and
        a mere warning; a weight of the wrong shape makes it an error. NOTICE is one more, whose
        name is among those that transformers prints with the error.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is written
        self.quantization_config.plan = _with_merged(model, _plan_of(self.quantization_config))
        write_apart(model, packed_names(model))
        state = model.state_dict()
        unwritten = never_saved(model).union(getattr(model, "all_tied_weights_keys", None) or {})
        self.quantization_config.checksums = checksums_of_written(
            model, {n: t for n, t in state.items() if n not in unwritten and t.numel()}
        )
        for name in left_out(compressed_layers(model)):
            del state[name]  # the neighbour's
        for name, tensor in state.items():
            if not tensor.numel():  # all alike, or shards would be cut by where they came from
                state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for key in (
            NOTICE,
            *(f"{n}.weight" for n in compressed_layers(model)),
            *sentinel_keys(model),
        ):
            state[key] = torch.empty(0, dtype=torch.uint8)
        # in the order of a model that was loaded, so that shards are cut at the same places
        from transformers.core_model_loading import dot_natural_key

        return {name: state[name] for name in sorted(state, key=dot_natural_key)}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer accepts the bare model: what has requires_grad is trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the model: kernels and layers are operators."""
        return True


def attach(model: Any, plan: Plan) -> EvoPressQuantizer:
    """Make `model`, whose linear layers hold the levels of `plan`, a compressed model.

    After it, save_pretrained writes a checkpoint that from_pretrained loads, and dequantize()
    works. Raises ValueError where layers and plan disagree. Returns `model.hf_quantizer`.
    """
    check_levels_match(model, plan)
    config = EvoPressConfig(plan)
    quantizer = EvoPressQuantizer(config, pre_quantized=True)
    quantizer.look_at(model)
    model.register_load_state_dict_pre_hook(_without_notice)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    return quantizer


def register_with_transformers() -> None:
    """Add the format to the registries of transformers, unless it is there."""
    auto: Any = import_module("transformers.quantizers.auto")
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, EvoPressConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, EvoPressQuantizer)
    # without this, EvoPressConfig(dequantize=True) over a compressed model is ignored
    if EvoPressConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (EvoPressConfig,)


def _plan_of(config: EvoPressConfig) -> Plan:
    if config.plan is None:
        raise ValueError("EvoPressConfig has no plan")
    return config.plan


def _with_merged(model: Any, plan: Plan) -> Plan:
    """Return `plan` with level dense for what is: an adapter was merged, the vocabulary resized."""
    plan, layers = _with_vocabulary(model, plan), compressed_layers(model)
    if any(name.endswith(".base_layer") for name in layers):
        raise ValueError(
            "the model is wrapped by adapters: save those with PeftModel.save_pretrained, or call "
            "unload() or merge_and_unload() before saving the model"
        )
    paths = resolve_units(model, plan)
    merged = [
        unit for unit, path in paths.items() if path not in layers and not plan[unit].is_dense
    ]
    if not merged:
        return plan
    logger.warning(
        "%d layers that were made dense (by a merged adapter, a new vocabulary) are saved so (%s); "
        "hf-evopress merge packs adapters, and compress all of it, again",
        len(merged),
        ", ".join(merged[:4]),
    )
    levels = {**plan.levels, **dict.fromkeys(merged, DENSE)}
    return plan.replace(levels=levels, budget={}, results={})


def _with_vocabulary(model: Any, plan: Plan) -> Plan:
    """Return `plan` with the shapes that embedding and head have, which may have been resized."""
    shapes = {end.name: end.shape for end in ends_of(model) if end.name in plan}
    return plan.replace(shapes={**plan.shapes, **shapes})


def _calibrated(plan: Plan) -> list[str]:
    """Return the levels of `plan` that need calibration statistics, sorted."""
    known = compose.normalize_each(plan).values()
    return sorted({str(level) for level in known if compose.needs_stats(level)})


def _without_notice(model: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Keep the notice, which is for those without this package, out of the unexpected keys."""
    state_dict.pop(f"{prefix}{NOTICE}", None)


# Here, not in the package's register(): when this module is what imports transformers first,
# that runs while this module is half loaded.
register_with_transformers()
