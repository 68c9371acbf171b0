"""What sparse weights take, and that they come back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_evopress.methods import compose
from hf_evopress.methods.maths import sparse
from hf_evopress.methods.maths.sparse import largest, largest_of_each, share

NAMES = ("sparsegpt", "wanda", "magnitude")
W = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


def state_of(level, weight=W):
    return compose.compress(compose.normalize(level), weight, None)


def weight_of(level, weight=W, dtype=torch.float32):
    level = compose.normalize(level)
    state = compose.compress(level, weight, None)
    return compose.decompress(level, state, tuple(weight.shape), dtype)


@pytest.mark.parametrize(
    "level, bits",
    [
        ("magnitude:sparsity=0.5", 1 + 8),
        ("magnitude:sparsity=0.75", 1 + 4),
        ("magnitude:pattern=2:4", 3 / 4 + 8),
        ("magnitude:pattern=4:8", 7 / 8 + 8),
        ("magnitude:pattern=1:2", 1 / 2 + 8),
        ("magnitude:sparsity=0.5,bits=4,group_size=64", 1 + 2 + 20 / 64),
        ("magnitude:pattern=2:4,bits=4,group_size=64", 3 / 4 + 2 + 20 / 64),
        ("magnitude:pattern=2:4,bits=4,group_size=64,symmetric=true", 3 / 4 + 2 + 16 / 64),
    ],
)
def test_a_weight_costs_its_share_of_places_values_and_scales(level, bits):
    assert compose.cost_bits(compose.normalize(level), (64, 128)) == 64 * 128 * bits


@pytest.mark.parametrize("shape", [(5, 40), (3, 8), (1, 16), (7, 24), (9, 13)])
@pytest.mark.parametrize(
    "params", ["sparsity=0.37", "pattern=3:8", "sparsity=0.6,bits=3,group_size=-1", "pattern=1:2"]
)
def test_ragged_shapes_cost_the_bytes_that_are_stored(shape, params):
    level, weight = compose.normalize(f"magnitude:{params}"), torch.randn(shape)
    if shape[1] % 8 and "pattern" in params:
        pytest.skip("patterns divide the inputs")
    state = compose.compress(level, weight, None)
    stored = sum(8 * v.numel() * v.element_size() for v in state.values())
    assert compose.cost_bits(level, shape) == stored


@pytest.mark.parametrize("pattern", sparse.PATTERNS)
def test_every_pattern_holds_in_every_group_and_every_place_comes_back(pattern):
    n, m = map(int, pattern.split(":"))
    got = weight_of(f"magnitude:pattern={pattern}")
    assert ((got != 0).unflatten(1, (-1, m)).sum(-1) == n).all()
    assert torch.equal(got, W.half().float() * (got != 0))


def test_every_mask_of_a_pattern_has_a_number_of_its_own():
    for pattern in sparse.PATTERNS:
        table = sparse.mask_table(pattern)
        assert len(set(table)) == len(table) <= 2 ** sparse._number_bits(pattern)


def test_kept_weights_are_stored_without_loss_where_their_dtype_holds_them():
    got = weight_of("magnitude:sparsity=0.5,values=bfloat16", W.bfloat16().float())
    assert torch.equal(got, W.bfloat16().float() * (got != 0))


def test_weights_beyond_the_dtype_become_its_largest():
    big = W.clone()
    big[0, 0], big[1, 1] = 1e6, -1e6
    got = weight_of("magnitude:sparsity=0.5", big)
    assert got[0, 0] == 65504 and got[1, 1] == -65504


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.999])
def test_sparsities_near_their_bounds_keep_what_they_say(sparsity):
    kept = W.numel() - round(W.numel() * sparsity)
    assert state_of(f"magnitude:sparsity={sparsity}")["values"].numel() == kept


def test_equal_weights_are_kept_in_the_exact_number():
    for level in ("magnitude:sparsity=0.3", "magnitude:pattern=2:4"):
        got = weight_of(level, torch.ones(24, 64))
        assert int(got.sum()) == sparse.n_kept(
            (24, 64), compose.method("magnitude").filled(compose.normalize(level).terms[0].kwargs)
        )


def test_pruned_weights_are_exactly_zero_when_others_are_codes():
    for symmetric in ("true", "false"):
        level = f"magnitude:sparsity=0.6,bits=4,group_size=32,symmetric={symmetric}"
        got = weight_of(level)
        small = W.abs() < W.abs().flatten().kthvalue(int(0.59 * W.numel())).values
        assert (got[small] == 0).all()
        assert (got - W)[~small].norm() < 0.12 * W[~small].norm()


@pytest.mark.parametrize(
    "params", ["sparsity=0.5", "pattern=2:4", "sparsity=0.5,bits=3,group_size=32"]
)
def test_tiles_and_the_whole_weight_decompress_alike(monkeypatch, params):
    whole = weight_of(f"magnitude:{params}", dtype=torch.bfloat16)
    monkeypatch.setattr(sparse, "TILE", 7 * 64)
    assert torch.equal(weight_of(f"magnitude:{params}", dtype=torch.bfloat16), whole)


@pytest.mark.parametrize("params", ["sparsity=0.5", "pattern=2:4,bits=3,group_size=32"])
def test_a_traced_layer_decompresses_alike(params):
    level = compose.normalize(f"magnitude:{params}")
    state = compose.compress(level, W, None)
    names = sorted(state)

    class Layer(torch.nn.Module):
        def forward(self, x, *tensors):
            state = dict(zip(names, tensors, strict=True))
            return F.linear(x, compose.decompress(level, state, (24, 64), torch.float32))

    x, tensors = torch.randn(2, 64), [state[name] for name in names]
    program = torch.export.export(Layer(), (x, *tensors))
    assert torch.allclose(program.module()(x, *tensors), Layer()(x, *tensors), atol=1e-6)


def test_a_few_outliers_after_a_quantised_term_lower_the_error():
    heavy = W * (1 + 20 * (W.abs() > 2.5))
    coded = weight_of("rtn:bits=3,group_size=64", heavy)
    both = weight_of("rtn:bits=3,group_size=64 + magnitude:sparsity=0.95", heavy)
    assert (both - heavy).norm() < 0.8 * (coded - heavy).norm()


def test_parts_of_a_share_add_up():
    assert sum(share(17, i, i + 3, 30) for i in range(0, 30, 3)) == 17


def test_largest_takes_any_count():
    scores = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    assert [int(largest(scores, k).sum()) for k in range(5)] == [0, 1, 2, 3, 4]
    assert largest(scores, 1).tolist() == [[False, False], [False, True]]


def test_largest_of_each_takes_n_of_every_m_neighbours():
    mask = largest_of_each(torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 9.0]]), "1:4")
    assert mask.tolist() == [[True, *[False] * 6, True]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "params, message",
    [
        ("sparsity=0.0", "between 0 and 1, both excluded.*got neither"),
        ("sparsity=1", "between 0 and 1, both excluded.*got sparsity=1.0"),
        ("sparsity=-0.1", "between 0 and 1"),
        ("sparsity=0.5,pattern=2:4", "sparsity or pattern, not both"),
        ("pattern=3:5", "takes pattern from any, 1:2"),
        ("pattern=4:4", "takes pattern from any, 1:2"),
        ("sparsity=0.5,bits=4", "bits=2 to 8 and group_size .* go together"),
        ("sparsity=0.5,group_size=64", "bits=2 to 8 and group_size .* go together"),
        ("sparsity=0.5,bits=9,group_size=64", "takes bits from 2, 3, 4, 5, 6, 7, 8, 16"),
        ("sparsity=0.5,symmetric=true", "symmetric=True means nothing without bits"),
        ("sparsity=0.5,bits=4,group_size=64,values=bfloat16", "means nothing with bits"),
        ("pattern=4:8,bits=4,group_size=12", "cuts groups of pattern=4:8; take a multiple of 8"),
    ],
)
def test_wrong_parameters_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        compose.normalize(f"{name}:{params}")


@pytest.mark.parametrize(
    "params, shape, message",
    [
        ("pattern=4:8", (4, 60), "pattern=4:8 does not divide the 60 inputs .* use sparsity"),
        ("sparsity=0.5,bits=4,group_size=128", (4, 576), "does not divide the 576 inputs"),
        ("sparsity=0.999", (4, 60), "keeps nothing of a weight of shape .* use zero"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(params, shape, message):
    with pytest.raises(ValueError, match=message):
        compose.check_shape(compose.normalize(f"magnitude:{params}"), shape)
