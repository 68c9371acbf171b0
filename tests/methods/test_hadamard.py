"""`hadamard`: codes of rotated rows."""

from __future__ import annotations

import torch

from hf_evopress.methods import compose


def error(level: str, W: torch.Tensor) -> float:
    made = compose.normalize(level)
    state = compose.compress(made, W, None)
    left = W - compose.decompress(made, state, (W.shape[0], W.shape[1]), torch.float32)
    return float(left.square().sum() / W.square().sum())


def test_outliers_in_a_row_cost_it_less_than_codes_of_the_row_as_it_is() -> None:
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    W[:, ::32] *= 8
    for bits in (2, 3, 4):
        plain = f"rtn:bits={bits},group_size=-1,symmetric=true"
        same = compose.cost_bits(compose.normalize(plain), (64, 256))
        assert compose.cost_bits(compose.normalize(f"hadamard:bits={bits}"), (64, 256)) == same
        assert error(f"hadamard:bits={bits}", W) < 0.8 * error(plain, W)


def test_on_gaussian_rows_it_has_the_error_of_the_best_uniform_quantiser() -> None:
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    for bits, least in ((2, 0.1188), (3, 0.0374), (4, 0.0115)):  # Max 1960, table II
        assert abs(error(f"hadamard:bits={bits}", W) - least) < 0.06 * least


def test_another_seed_is_another_basis() -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    states = [
        compose.compress(compose.normalize(f"hadamard:bits=4,seed={s}"), W, None) for s in (0, 1)
    ]
    assert not torch.equal(states[0]["codes"], states[1]["codes"])
