"""Names that tensors have in a checkpoint's files, where transformers gives them others in a model.

Many vision-language models are written by older names than their modules have, such as
`language_model.model.layers.0`, now `model.language_model.layers.0`; a few tensors are also turned
or cut. Plans and models go by module names, files and their checksums by the names that are
written. Versions of this package before there was this module wrote checksums by module names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class FileNames:
    """The names of tensors in files and in a model, of those that are in both as they are.

    in_model: name in a file, or in its checksums -> name in the model.
    in_file: name in the model -> name in a file.
    """

    in_model: Mapping[str, str]
    in_file: Mapping[str, str]

    def of_file(self, name: str) -> str:
        """Return the name in the files of a tensor that goes by `name` in either."""
        if self.in_file.get(self.in_model.get(name, "")) == name:
            return name
        return self.in_file.get(self.in_model.get(name, name), name)

    def of_model(self, name: str) -> str:
        """Return the name in the model of a tensor that is called `name` in the files."""
        return self.in_model.get(name, name)


def names_of(
    model: Any,
    files: Iterable[str],
    others: Iterable[str] = (),
    *,
    quantizer: Any = None,
    are_packed: bool = False,
) -> FileNames:
    """Return how tensors called so in the files go by in `model`, which may be on the meta device.

    others: further names, of a file that was written otherwise or of the model itself. Tensors that
    transformers does not only rename but also converts are left out; of packed ones there are none,
    though some are called as what is: experts, which stock models merge.
    """
    rules = get_model_conversion_mapping(model, None, quantizer)
    converters = [r for r in rules if isinstance(r, WeightConverter) and not are_packed]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    base, known = model.base_model_prefix, model.state_dict()
    here, in_model = set(files), {}
    for name in sorted(here.union(others), key=dot_natural_key):  # some rules need it
        renamed, pattern = rename_source_key(name, renamings, converters, base, known)
        if renamed not in known and name in known:  # as transformers has it
            renamed, pattern = rename_source_key(name, [], [], base, known)
        if pattern is None:
            in_model[name] = renamed
    return FileNames(in_model, {in_model[name]: name for name in here if name in in_model})


def as_written(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as save_pretrained writes them; what is only renamed is the same object."""
    if getattr(model, "_weight_conversions", None) == []:
        return state  # it was loaded from a file of the same names
    return revert_weight_conversion(model, state)


def apart(rules: Iterable[Any], packed: Iterable[str], *, experts: bool = False) -> list[Any]:
    """Return rules of conversion without those that merge what is packed by itself.

    Such as query, key and value of Nomic BERT, one weight in dense files. packed: names of packed
    tensors in the model. experts: whether all that merge experts are left out.
    """
    names = list(packed)
    return [
        rule
        for rule in rules
        if not isinstance(rule, WeightConverter)
        or not (_merges(rule, names) or (experts and _is_of_experts(rule)))
    ]


def write_apart(model: Any, packed: Iterable[str]) -> None:
    """Have save_pretrained not merge packed tensors."""
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:  # it was not loaded: those that save_pretrained would find
        found = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in found if not isinstance(rule, PrefixChange)]
    if len(kept := apart(rules, packed)) < len(rules):
        model._weight_conversions = kept


def _is_of_experts(rule: WeightConverter) -> bool:
    return any("experts" in target for target in rule.target_patterns)


def _merges(rule: WeightConverter, names: Iterable[str]) -> bool:
    try:
        back = rule.reverse_transform()
    except RuntimeError:  # of what is only loaded
        return False
    return any(back.rename_source_key(name)[1] is not None for name in names)
