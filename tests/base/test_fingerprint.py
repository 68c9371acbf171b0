"""Folders of results know what they were made from."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.base.fingerprint import (
    claim,
    model_fingerprint,
    tensor_fingerprint,
    text_fingerprint,
)


def test_the_same_weights_have_the_same_fingerprint(tiny_model):
    assert model_fingerprint(tiny_model()) == model_fingerprint(tiny_model())


def test_a_small_change_of_one_weight_matrix_changes_it(tiny_model):
    model = tiny_model()
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert model_fingerprint(model) != before


def test_another_dtype_is_another_model(tiny_model):
    assert model_fingerprint(tiny_model()) != model_fingerprint(tiny_model().bfloat16())


def test_tensors_of_equal_bytes_and_other_shape_differ():
    x = torch.arange(6)
    assert tensor_fingerprint(x.view(2, 3)) != tensor_fingerprint(x.view(3, 2))


def test_texts_do_not_run_into_each_other():
    assert text_fingerprint("ab", "c") != text_fingerprint("a", "bc")


def test_a_folder_takes_the_same_make_again(tmp_path):
    claim(tmp_path, {"model": "a", "tokens": [1, 2]}, what="statistics")
    claim(tmp_path, {"model": "a", "tokens": (1, 2)}, what="statistics")


def test_another_make_is_refused_by_what_differs(tmp_path):
    claim(tmp_path, {"model": "a", "tokens": "x"}, what="statistics")
    with pytest.raises(ValueError, match=r"other tokens \(x there, y now\); give another work"):
        claim(tmp_path, {"model": "a", "tokens": "y"}, what="statistics")


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        claim(tmp_path, {}, what="statistics")
