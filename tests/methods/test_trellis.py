"""Trellis codes: their error, their bytes, both kinds of feedback, and any shape."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.methods.maths.walks import BITS
from hf_evopress.methods.trellis import Trellis

SHAPES = [(1, 1), (1, 40), (33, 1), (7, 3), (16, 16), (17, 31), (48, 90), (130, 70)]

FIRST = [-0.41129136085510254, 0.17754343152046204, -0.32720404863357544, -0.17135734856128693]
TOTAL = 3.394963256083429


def layer(rows=48, columns=96, seed=0):
    """Return a weight, statistics of correlated inputs, and correlated output gradients."""
    g = torch.Generator().manual_seed(seed)

    def moment(n):
        mix = torch.randn(n, n, generator=g) / n**0.5 + 0.3 * torch.eye(n)
        X = torch.randn(4 * n + 8, n, generator=g) @ mix
        return X.T @ X / len(X)

    H, G = moment(columns), moment(rows)
    first = torch.randn(1, columns, generator=g) * 3
    return torch.randn(rows, columns, generator=g), Stats(H, first.T @ first, None, 400), G


def made(level, W, stats):
    level = compose.normalize(level)
    state = compose.compress(level, W, stats)
    return state, compose.decompress(level, state, tuple(W.shape), torch.float32)


def loss(d, H, G=None):
    weighed = d @ H
    return float(((weighed if G is None else G @ weighed) * d).sum())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "bits, expected",
    [(1, 0.282), (2, 0.079), (3, 0.0216), (4, 0.0062), (1.5, 0.150), (2.5, 0.0411), (3.5, 0.0120)],
)
def test_a_gaussian_weight_loses_what_was_measured(bits, expected):
    """A quarter more than the bound 4^-bits with 2^8 states; scalar codes lose twice as much."""
    W = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    _, W_hat = made(f"trellis:bits={bits},state_bits=8,feedback=none", W, None)
    assert float((W - W_hat).square().mean()) == pytest.approx(expected, rel=0.05)


def test_more_states_and_more_bits_lose_less():
    W, stats, _ = layer()

    def at(bits, state_bits):
        level = f"trellis:bits={bits},state_bits={state_bits}"
        return loss(W - made(level, W, stats)[1], stats.hessian())

    assert at(3, 10) < at(3, 8) < at(3, 5)
    by_bits = [at(bits, 10) for bits in BITS]
    assert by_bits == sorted(by_bits, reverse=True)


def test_feedback_lowers_the_loss_that_it_is_for():
    W, stats, G = layer(96, 144)
    H, two_sided = stats.hessian(), stats.with_outputs([G])
    level = "trellis:bits=2,state_bits=8"
    none = W - made(f"{level},feedback=none", W, None)[1]
    one = W - made(level, W, stats)[1]
    two = W - made(level, W, two_sided)[1]
    assert loss(one, H) < 0.85 * loss(none, H)
    assert loss(two, H, G) < 0.85 * loss(one, H, G)
    assert torch.equal(one, W - made(f"{level},feedback=inputs", W, two_sided)[1])


def test_rotations_help_a_weight_with_outliers():
    W, stats, _ = layer()
    W[5] *= 20
    W[:, 11] *= 20
    H = stats.hessian()
    by_rotation = [
        loss(W - made(f"trellis:bits=3,state_bits=8,rotation={r}", W, stats)[1], H)
        for r in ("full", "none")
    ]
    assert by_rotation[0] < 0.3 * by_rotation[1]


def test_it_loses_less_than_gptq_at_fewer_bits():
    W, stats, _ = layer(64, 128)
    H = stats.hessian()
    trellis, gptq = "trellis:bits=3,state_bits=10", "gptq:bits=3,group_size=64"
    costs = [compose.cost_bits(compose.normalize(x), (64, 128)) for x in (trellis, gptq)]
    losses = [loss(W - made(x, W, stats)[1], H) for x in (trellis, gptq)]
    assert costs[0] < costs[1] and losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    ["", ",tail_biting=false", ",rotation=none,codebook=3inst", ",scales=channels,order=mma"],
)
def test_any_shape_costs_its_whole_tiles(shape, options):
    W, stats, G = layer(*shape)
    level = compose.normalize(f"trellis:bits=3,state_bits=7{options}")
    state, W_hat = made(level, W, stats.with_outputs([G]))
    tiles = -(-shape[0] // 16) * -(-shape[1] // 16)
    starts = -(-tiles * 4 // 8) if "tail" in options else 0
    stored = sum(t.numel() * t.element_size() for t in state.values())
    assert stored == tiles * 96 + starts + (2 * sum(shape) if "channels" in options else 4)
    assert compose.cost_bits(level, shape) == 8 * stored
    assert W_hat.shape == W.shape and W_hat.isfinite().all()
    if W.numel() > 1000:  # smaller ones do not look Gaussian, nor does the sink's row
        assert float((W - W_hat).norm() / W.norm()) < 0.5


def test_bits_per_weight_are_exact_where_16_divides():
    for bits in BITS:
        level = compose.normalize(f"trellis:bits={bits}")
        assert compose.cost_bits(level, (576, 1536)) == bits * 576 * 1536 + 32


def test_a_weight_of_zeros_stays_one():
    _, stats, G = layer(20, 30)
    for given in (stats, stats.with_outputs([G])):
        state, W_hat = made("trellis:bits=2,state_bits=6", torch.zeros(20, 30), given)
        assert not W_hat.any() and not state["scale"].any()


def test_scales_of_channels_of_zeros_stay_finite():
    W, stats, G = layer(20, 30)
    W[3], W[:, 7] = 0, 0
    level = "trellis:bits=3,state_bits=8,scales=channels"
    for given in (stats, stats.with_outputs([G])):
        assert made(level, W, given)[1].isfinite().all()
        zeros, W_zero = made(level, torch.zeros(20, 30), given)
        assert not W_zero.any() and not zeros["row_scales"].any()


def test_scales_of_channels_follow_outliers_where_a_rotation_spreads_them():
    """Blocks of 32 mix a loud channel with its neighbours; with a scale of its own it is not."""
    W, stats, G = layer(64, 96)
    W[5] *= 20
    W[:, 11] *= 20
    two_sided, H = stats.with_outputs([G]), stats.hessian()
    level = "trellis:bits=3,state_bits=8,rotation=32"
    tensor, channels = (
        loss(W - made(f"{level},scales={x}", W, two_sided)[1], H, G) for x in ("tensor", "channels")
    )
    assert channels < 0.7 * tensor


def test_the_order_along_a_walk_is_another_code_of_the_same_error():
    W, stats, _ = layer(64, 96)
    state, rows = made("trellis:bits=2,state_bits=8", W, stats)
    other, mma = made("trellis:bits=2,state_bits=8,order=mma", W, stats)
    assert not torch.equal(state["codes"], other["codes"])
    H = stats.hessian()
    assert loss(W - mma, H) == pytest.approx(loss(W - rows, H), rel=0.1)


def test_outputs_without_gradients_are_rounded_as_on_one_side():
    W, stats, G = layer()
    level = "trellis:bits=2,state_bits=6"
    state, found = made(level, W, stats.with_outputs([torch.zeros_like(G)]))
    expected = made(level, W, stats)
    assert torch.equal(state["codes"], expected[0]["codes"])
    assert torch.equal(found, expected[1])


@pytest.mark.parametrize("scales", ["tensor", "channels"])
@pytest.mark.parametrize("zero", ["inputs", "outputs", "both"])
def test_a_weight_that_no_input_or_gradient_reaches_is_kept(scales, zero):
    W, stats, G = layer()
    if zero != "outputs":
        stats = Stats(torch.zeros_like(stats.gram), None, torch.zeros(W.shape[1]), 8)
    moments = torch.zeros_like(G) if zero != "inputs" else 1e-30 * G  # which nothing divides by
    level = f"trellis:bits=4,state_bits=8,scales={scales}"
    _, found = made(level, W, stats.with_outputs([moments]))
    assert float((found - W).square().sum() / W.square().sum()) < 0.02


def test_moments_of_another_weight_are_refused():
    W, stats, _ = layer()
    with pytest.raises(ValueError, match="48 outputs, the moments of its gradients have 12"):
        made("trellis:bits=2", W, stats.with_outputs([torch.eye(12)]))


@pytest.mark.parametrize(
    "level, reason",
    [
        ("trellis", "needs bits=... "),
        (
            "trellis:bits=9",
            "takes bits from 1, 1.5, 2, .*, 4.5, 5, 6, 7, 8; got bits=9",
        ),
        ("trellis:bits=6,state_bits=5", "needs state_bits >= bits"),
        ("trellis:bits=4.5,state_bits=4", "needs state_bits >= bits"),
        ("trellis:bits=2,state_bits=17", "needs state_bits <= 16"),
        ("trellis:bits=2,rotation=48", "takes rotation from full, none"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(level, reason):
    with pytest.raises(ValueError, match=reason):
        compose.normalize(level)


def test_a_block_that_does_not_fit_is_refused_with_a_way_out():
    level = compose.normalize("trellis:bits=2,rotation=64")
    compose.check_shape(level, (128, 192))
    with pytest.raises(ValueError, match=r"rotation=64 does not divide the 96 inputs.*=full"):
        compose.check_shape(level, (128, 96))


def test_truncated_codes_are_refused():
    W, stats, _ = layer()
    level = compose.normalize("trellis:bits=2,state_bits=6")
    state, _ = made(level, W, stats)
    state["codes"] = state["codes"][:-1]
    with pytest.raises(ValueError, match=r"codes of shape \(3, 6, 64\), got \(2, 6, 64\)"):
        compose.decompress(level, state, (48, 96), torch.float32)


def test_settings_and_weights_in_step_are_made_as_if_alone(monkeypatch):
    _, stats, _ = layer()
    Ws = [layer(rows, seed=rows)[0] for rows in (48, 16, 20)]
    two_sided = stats.with_outputs([layer(W.shape[0])[2] for W in Ws])
    options = ("2,state_bits=6", "3,state_bits=6", "3,state_bits=7", "2,state_bits=6,seed=1")
    levels = [compose.normalize(f"trellis:bits={x}") for x in options]
    together = compose.compress_many(levels, Ws, two_sided)
    for level, states in zip(levels, together, strict=True):
        for W, G, state in zip(Ws, two_sided.outputs, states, strict=True):
            alone = compose.compress(level, W, stats.with_outputs([G]))
            # products of other heights may turn a tie, and with it a walk
            different = (alone["codes"] != state["codes"]).float().mean()
            assert different < 0.1
    small = "hf_evopress.methods.maths.trellis_rounding.MAX_VALUES"
    monkeypatch.setattr(small, 1)  # each alone, for want of memory
    apart = compose.compress_many(levels, Ws, two_sided)
    assert [[list(s) for s in states] for states in apart] == [
        [list(s) for s in states] for states in together
    ]


def test_the_factor_of_one_input_is_made_once():
    W, stats, G = layer()
    compose.compress_many(
        [compose.normalize(f"trellis:bits={b},state_bits=6") for b in (2, 3)],
        [W, W[:16]],
        stats.with_outputs([G, G[:16, :16]]),
    )
    assert sum(key[0] == "trellis" for key in stats._factors) == 2  # the moment and its factor


def test_a_weight_does_not_follow_the_default_dtype():
    W, stats, _ = layer()
    state, expected = made("trellis:bits=3,state_bits=8", W, stats)
    torch.set_default_dtype(torch.bfloat16)
    try:
        level = compose.normalize("trellis:bits=3,state_bits=8")
        found = compose.decompress(level, state, (48, 96), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_side_with_a_large_odd_factor_is_refused_with_the_way_out():
    level = compose.normalize("trellis:bits=2")
    with pytest.raises(ValueError, match="32001 outputs have the odd factor 32001.*rotation=none"):
        compose.check_shape(level, (32001, 576))
    with pytest.raises(ValueError, match="2050 inputs have the odd factor 1025"):
        compose.check_shape(level, (64, 2050))
    compose.check_shape(level, (128256, 11008))  # 501 x 256, 43 x 256
    compose.check_shape(compose.normalize("trellis:bits=2,rotation=none"), (32001, 576))


@pytest.mark.parametrize("options", ["", ",scales=channels,order=mma"])
def test_rotating_activations_is_the_same_layer(options):
    W, stats, _ = layer(40, 72)
    level = compose.normalize(f"trellis:bits=3,state_bits=6{options}")
    state, W_hat = made(level, W, stats)
    g = torch.Generator().manual_seed(3)
    x, bias = torch.randn(2, 5, 72, generator=g), torch.randn(40, generator=g)
    params = Trellis().filled(level.terms[0].kwargs)
    y = Trellis().product(x.flatten(0, 1), state, (40, 72), **params).view(2, 5, 40) + bias
    assert torch.allclose(y, x @ W_hat.T + bias, atol=2e-5 * float(x.norm()))


def test_a_low_rank_term_takes_what_is_left():
    W, stats, G = layer()
    two_sided = stats.with_outputs([G])
    H = stats.hessian()
    _, alone = made("trellis:bits=2,state_bits=6", W, two_sided)
    _, more = made("trellis:bits=2,state_bits=6 + lowrank:rank=8", W, two_sided)
    assert loss(W - more, H) < 0.8 * loss(W - alone, H)


def test_the_decoded_weight_is_the_same_bit_for_bit_wherever_it_is_computed(device):
    W, stats, _ = layer(40, 72)
    channels = ",scales=channels,order=mma"
    for options in ("", ",tail_biting=false", ",rotation=none", ",codebook=mul1", channels):
        level = compose.normalize(f"trellis:bits=3,state_bits=7{options}")
        state, W_hat = made(level, W, stats)
        there = {name: tensor.to(device) for name, tensor in state.items()}
        moved = compose.decompress(level, there, (40, 72), torch.float32)
        assert moved.device.type == device.type
        assert torch.equal(moved.cpu(), W_hat)


def test_a_weight_is_made_on_the_device_of_its_statistics(device):
    W, stats, G = layer(32, 48)
    level = compose.normalize("trellis:bits=2,state_bits=6")
    here = compose.compress(level, W, stats.with_outputs([G]))
    there = Stats(stats.gram.to(device), stats.sink.to(device), None, 400)
    made_there = compose.compress(level, W.to(device), there.with_outputs([G.to(device)]))
    assert same({k: v.cpu() for k, v in made_there.items()}, here) or device.type == "cuda"
    assert {v.device.type for v in made_there.values()} == {device.type}


def test_known_answer():
    """Fixed for ever: checkpoints hold nothing but these bytes."""
    codes = (torch.arange(2 * 1 * 64) * 37 % 256).to(torch.uint8).view(2, 1, 64)
    level = compose.normalize("trellis:bits=2,state_bits=6")
    state = {"codes": codes, "scale": torch.tensor([0.5])}
    W = compose.decompress(level, state, (24, 12), torch.float32)
    assert W[0, :4].tolist() == FIRST
    assert float(W.double().sum()) == TOTAL


@pytest.mark.parametrize("n_zero", [1, 24])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_rows_and_columns_of_zeros_stay_zeros_and_do_no_harm_to_others(n_zero, side):
    W, stats, G = layer(48, 64)
    W, given = 0.02 * W, stats.with_outputs([G])
    at = (slice(n_zero),) if side == "rows" else (slice(None), slice(n_zero))
    W[at] = 0.0
    H, errors = stats.hessian(), {}
    for scales in ("tensor", "channels"):
        _, W_hat = made(f"trellis:bits=4,state_bits=8,scales={scales}", W, given)
        errors[scales] = loss(W - W_hat, H, G)
    assert not W_hat[at].any() and W_hat.isfinite().all()
    assert errors["channels"] < 1.1 * errors["tensor"]
