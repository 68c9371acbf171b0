"""`folded`: a weight of values that it shares at random places."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods import compose


@pytest.mark.parametrize("uses", [2, 3, 4, 8])
def test_one_shot_it_loses_all_but_one_in_so_many_of_a_gaussian_weight(uses: int) -> None:
    W = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    level = compose.normalize(f"folded:share={1 / uses}")
    state = compose.compress(level, W, None)
    left = W - compose.decompress(level, state, (96, 256), torch.float32)
    assert float(left.square().sum() / W.square().sum()) == pytest.approx(1 - 1 / uses, abs=0.015)


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
def test_with_as_many_values_as_weights_it_is_the_weight(values: str) -> None:
    W = torch.randn(24, 64).to(getattr(torch, values)).float()
    level = compose.normalize(f"folded:share=1,values={values}")
    state = compose.compress(level, W, None)
    assert torch.equal(compose.decompress(level, state, (24, 64), torch.float32), W)


def test_half_as_many_values_take_half_the_bytes_and_unfold_on_any_device(
    device: torch.device,
) -> None:
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    level = compose.normalize("folded:share=0.5")
    assert compose.cost_bits(level, (24, 64)) == 8 * 24 * 64
    state = compose.compress(level, W, None)
    there = compose.compress(level, W.to(device), None)
    assert torch.equal(there["psi"].cpu(), state["psi"])
    made = compose.decompress(level, there, (24, 64), torch.float32)
    assert torch.equal(made.cpu(), compose.decompress(level, state, (24, 64), torch.float32))


@pytest.mark.parametrize("share", [0, 0.0005, 1.5])
def test_shares_that_leave_nothing_or_more_than_there_was_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"folded needs share [<>]= [0-9.]+, got share={share}"):
        compose.normalize(f"folded:share={share}")
