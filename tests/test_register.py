"""`import hf_evopress` teaches transformers the format, in any order, without importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers.quantizers import auto

import hf_evopress
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.quantizer import EvoPressQuantizer

LOOK = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q; "
    "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as c; "
    "print(q['evopress'].__name__, c['evopress'].__name__)"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_evopress; import transformers",
        "import hf_evopress.loading.quantizer",
    ],
)
def test_the_format_is_registered_whatever_is_imported_first(imports: str) -> None:
    assert run(f"{imports}; {LOOK}").split() == ["EvoPressQuantizer", "EvoPressConfig"]


def test_the_package_and_its_levels_do_not_import_torch() -> None:
    code = (
        "import hf_evopress, sys; hf_evopress.Level.parse('dense'); hf_evopress.Plan; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert run(code).strip() == "set()"


def test_registering_again_changes_nothing() -> None:
    before = len(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    hf_evopress.register()
    hf_evopress.register()
    assert (len(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES) == before
    assert auto.AUTO_QUANTIZER_MAPPING["evopress"] is EvoPressQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["evopress"] is EvoPressConfig


def test_public_names_are_there_and_documented() -> None:
    for name in hf_evopress.__all__:
        value = getattr(hf_evopress, name)
        assert isinstance(value, str) or value.__doc__
    assert set(hf_evopress.__all__) <= set(dir(hf_evopress))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Plam'"):
        hf_evopress.Plam  # noqa: B018
