"""Compressed models as first-class citizens of the Hugging Face ecosystem.

    import hf_evopress  # teaches transformers the format; costs milliseconds
    model = AutoModelForCausalLM.from_pretrained("me/smol-3.3bit")

The import is needed only where HF_EVOPRESS_AUTOLOAD=0: else `import torch` does it, where the
package is installed. It imports neither torch nor transformers: public names load on first use,
and the format is registered as soon as transformers looks for it.

The rooms, in the order of the pipeline; each imports only from rooms above it:

    base         what any Python project needs: plug-ins, files, devices, processes
    plans        levels and plans as text, and where plans live: files, the Hub
    methods      what one weight may become: one method per file, over shared tensor maths
    models       what a model is made of: units, sub-blocks, experts, block by block
    search       which unit gets which level: space, budget, knapsack, evolution
    recipes      the YAML file that decides everything
    calibration  text in, second moments of inputs and output gradients out
    store        every level of every unit, packed as it will ship
    scoring      what a plan or a model is worth: fitness, evaluator, evaluation
    loading      the format inside transformers: config, quantizer, compressed layers
    serving      the format inside programs that serve models: vLLM
    export       the format for other programs
    refine       better codes at the same bytes
    adapters     EoRA and LoRD as PEFT adapters; merging
    training     transformers' Trainer on a compressed model
    sharing      the Hub, cards, reports, plots
    jobs         the whole line, step by step, resumable: start at jobs/pipeline.py
    cli          words in, print out
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base.after_import import after_import
from .base.version import __version__

if TYPE_CHECKING:
    from .jobs.stack import download as download
    from .loading.blocks import resize as resize
    from .loading.config import EvoPressConfig as EvoPressConfig
    from .loading.kv_cache.cache import GearCache as GearCache
    from .loading.layers import CompressedLinear as CompressedLinear
    from .loading.quantizer import EvoPressQuantizer as EvoPressQuantizer
    from .plans.level import Level as Level
    from .plans.plan import Plan as Plan
    from .training.gradual_pruning import GradualPruning as GradualPruning
    from .training.ordered_ranks import OrderedRanks as OrderedRanks
    from .training.ordered_ranks import RankTruncation as RankTruncation
    from .training.pv_tuning import PVTuning as PVTuning
    from .training.quest import make_quest as make_quest
    from .training.random_fold import make_folded as make_folded
    from .training.structured_masks import StructuredPruning as StructuredPruning

_PUBLIC = {  # name -> module that defines it
    "CompressedLinear": "loading.layers",
    "EvoPressConfig": "loading.config",
    "EvoPressQuantizer": "loading.quantizer",
    "GearCache": "loading.kv_cache.cache",
    "GradualPruning": "training.gradual_pruning",
    "Level": "plans.level",
    "OrderedRanks": "training.ordered_ranks",
    "PVTuning": "training.pv_tuning",
    "Plan": "plans.plan",
    "RankTruncation": "training.ordered_ranks",
    "StructuredPruning": "training.structured_masks",
    "download": "jobs.stack",
    "make_folded": "training.random_fold",
    "make_quest": "training.quest",
    "resize": "loading.blocks",
}

__all__ = ["__version__", "register", *_PUBLIC]


def register() -> None:
    """Teach transformers to load and save compressed models; a second call does nothing.

    `import hf_evopress` does this by itself.
    """
    import_module(".loading.quantizer", __name__)  # registers when it is first imported


def _offer() -> None:
    import_module(".loading.offer", __name__).offer()


def _teach_peft() -> None:
    import_module(".adapters.peft_layers", __name__).register_with_peft()


def _count_weights() -> None:
    counting = import_module(".loading.counting", __name__)
    counting.count_in_transformers()
    for name in ("peft.peft_model", "peft.mixed_model"):
        after_import(name, partial(counting.count_in_peft, name))


def _teach_generate() -> None:
    import_module(".loading.kv_cache.generation", __name__).teach_generate()


def _teach_auto_models() -> None:
    import_module(".jobs.sized_models", __name__).teach_auto_models()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


after_import("transformers.quantizers.auto", _offer)
after_import("transformers.generation.utils", _teach_generate)
after_import("transformers.models.auto.modeling_auto", _teach_auto_models)
# only who has compressed layers needs a PEFT that knows them
after_import(
    f"{__name__}.loading.layers", lambda: after_import("peft.tuners.lora.model", _teach_peft)
)
after_import(f"{__name__}.loading.layers", _count_weights)
