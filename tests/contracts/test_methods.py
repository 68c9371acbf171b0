"""What every method promises, tried on the examples that each declares."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from hf_evopress.base import plugins
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.plans.level import Level

SHAPES = ((24, 64), (64, 64), (7, 128))
NAMES = plugins.names("methods")
LEVELS = [level for name in NAMES for level in compose.method(name).examples]
COMPOSITIONS = [
    "gptq:bits=3,group_size=32 + lowrank:rank=4,factors=int8",
    "gptq:bits=2,group_size=32 + rtn:bits=2,group_size=32 + lowrank:rank=2",
    "rtn:bits=2,group_size=64 + sparsegpt:sparsity=0.9",
    "sparsegpt:sparsity=0.5,bits=4,group_size=32 + lowrank:rank=4,factors=bfloat16",
    "magnitude:pattern=2:4 + lowrank:rank=3,metric=plain",
    "lowrank:rank=4 + wanda:sparsity=0.8",
    "zero + lowrank:rank=6",
    "gptq:bits=2,group_size=32 + bitstack:blocks=2",
    "bitstack:blocks=2 + dict:bits=3",
]
EVERY = LEVELS + COMPOSITIONS
FACTORED = ("dict", "folded", "lowrank", "mpo")  # what is kept are entries, not weights
CASES = [(level, shape) for level in EVERY for shape in SHAPES]


def make(level, shape=SHAPES[0]):
    """Return level, weight and statistics; skip shapes that the level cannot take."""
    level = compose.normalize(level)
    try:
        compose.check_shape(level, shape)
    except ValueError as error:
        if shape == SHAPES[0]:
            raise
        pytest.skip(str(error))
    torch.manual_seed(0)
    W = torch.randn(shape).bfloat16().float()
    X = torch.randn(300, shape[1]) @ torch.randn(shape[1], shape[1]) + 0.5
    stats = Stats(X.T @ X / 300, X[:1].T @ X[:1], X.mean(0), 300)
    return level, W, stats


def floats(state):
    return {k: v for k, v in state.items() if v.is_floating_point()}


def stored_bits(state):
    return sum(8 * v.numel() * v.element_size() for v in state.values())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def signature(state):
    return {k: (tuple(v.shape), v.dtype) for k, v in state.items()}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "drop"])
def test_methods_declare_examples(name):
    assert compose.method(name).examples
    for example in compose.method(name).examples:
        assert compose.normalize(example).terms[0].method == name


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_they_hold(name):
    assert plugins.describe("methods", name)
    for param in compose.method(name).params.values():
        assert param.doc


@pytest.mark.parametrize("level", EVERY)
def test_the_canonical_string_is_a_fixed_point(level):
    canonical = compose.normalize(level)
    assert compose.normalize(str(canonical)) == canonical
    assert str(Level.parse(str(canonical))) == str(canonical)


@pytest.mark.parametrize("level", LEVELS)
def test_written_defaults_are_left_out_of_the_canonical_string(level):
    (term,) = compose.normalize(level).terms
    part = compose.method(term.method)
    full = part.filled(term.kwargs)
    assert part.normalize(type(term).of(term.method, **full)) == term


@pytest.mark.parametrize("level, shape", CASES)
def test_declared_cost_is_what_is_stored(level, shape):
    level, W, stats = make(level, shape)
    assert compose.cost_bits(level, shape) == stored_bits(compose.compress(level, W, stats))


@pytest.mark.parametrize("level, shape", CASES)
def test_empty_promises_what_compress_makes(level, shape):
    level, W, stats = make(level, shape)
    made = signature(compose.compress(level, W, stats))
    by_dtype = [compose.empty(level, shape, dtype) for dtype in (torch.bfloat16, torch.float32)]
    fixed, other = map(signature, by_dtype)
    assert all(v.is_meta for v in by_dtype[0].values())
    assert made.keys() == fixed.keys()
    for name, promised in fixed.items():
        assert made[name][0] == promised[0]
        if other[name] == promised:  # does not follow the dtype that was asked for
            assert made[name][1] == promised[1]


@pytest.mark.parametrize("level, shape", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole_weight(level, shape, dtype):
    level, W, stats = make(level, shape)
    state = compose.compress(level, W, stats)
    rows = torch.tensor([shape[0] - 1, 0, 3, 3])
    found = compose.decompress_rows(level, state, shape, rows, dtype)
    whole = compose.decompress(level, state, shape, dtype)[rows]
    assert found.dtype == dtype
    # a product of fewer rows may add up in another order
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    exact = "lowrank" not in str(level)
    assert torch.allclose(found, whole, rtol=0 if exact else tolerance, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("level", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_through_a_file_gives_a_finite_weight(level, dtype):
    level, W, stats = make(level)
    state = load(save(compose.compress(level, W, stats)))
    weight = compose.decompress(level, state, SHAPES[0], dtype)
    assert weight.shape == W.shape and weight.dtype == dtype
    assert torch.isfinite(weight).all()
    exact = compose.decompress(level, state, SHAPES[0], torch.float32)
    assert torch.equal(weight, exact.to(dtype)), "computed in float32, cast last"


@pytest.mark.parametrize("level", EVERY)
def test_the_same_input_gives_the_same_bytes(level):
    level, W, stats = make(level)
    before = W.clone()
    first = compose.compress(level, W, stats)
    again = compose.compress(level, W.clone(), make(level)[2])
    assert same(first, again)
    assert torch.equal(W, before), "the weight itself is left alone"


@pytest.mark.parametrize("level", EVERY)
def test_a_weight_whose_inputs_were_zero_is_kept_as_if_they_counted_alike(level):
    level, W, _ = make(level)
    n, zeros = W.shape[1], torch.zeros(W.shape[1], W.shape[1])
    alike = Stats(torch.eye(n), None, torch.zeros(n), 9)
    found = compose.compress(level, W, Stats(zeros, zeros, torch.zeros(n), 9))
    assert same(found, compose.compress(level, W, alike))


@pytest.mark.parametrize("level", EVERY)
def test_weights_that_share_an_input_are_made_as_if_alone(level):
    level, W, stats = make(level)
    Ws = [W, W[:9] * 2, W.flip(0)]
    together = compose.compress_stacked(level, Ws, stats)
    for weight, state in zip(Ws, together, strict=True):
        shape = (weight.shape[0], weight.shape[1])
        alone = compose.compress(level, weight, stats)
        assert signature(state) == signature(alone)
        expected = compose.decompress(level, alone, shape, torch.float32)
        # A product of another height may round differently, and flip a code once in a while.
        got = compose.decompress(level, state, shape, torch.float32)
        assert (got - expected).norm() <= 0.02 * expected.norm() + 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if n != "drop"])
def test_many_levels_are_made_as_if_alone(name):
    levels = [make(example)[0] for example in compose.method(name).examples]
    _, W, stats = make(levels[0])
    for level, (state,) in zip(levels, compose.compress_many(levels, [W], stats), strict=True):
        alone = compose.compress(level, W, stats)
        assert signature(state) == signature(alone)
        expected = compose.decompress(level, alone, SHAPES[0], torch.float32)
        got = compose.decompress(level, state, SHAPES[0], torch.float32)
        assert (got - expected).norm() <= 0.02 * expected.norm() + 1e-6


@pytest.mark.parametrize("level", EVERY)
def test_the_operator_is_the_decompressed_layer(level):
    level, W, stats = make(level)
    state = compose.compress(level, W, stats)
    bias, x = torch.randn(W.shape[0]), torch.randn(2, 5, W.shape[1])
    y = compose.operator(level, state, bias, SHAPES[0], torch.float32)(x)
    weight = compose.decompress(level, state, SHAPES[0], torch.float32)
    fix = compose.bias_fix(level, state)
    expected = x @ weight.T + bias + (0 if fix is None else fix)
    assert torch.allclose(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("level, shape", CASES)
def test_the_product_by_parts_is_the_decompressed_layer(level, shape):
    level, W, stats = make(level, shape)
    state = compose.compress(level, W, stats)
    bias, x = torch.randn(shape[0]), torch.randn(3, shape[1])
    y = compose.product(level, state, bias, shape, x)
    fix = compose.bias_fix(level, state)
    weight = compose.decompress(level, state, shape, torch.float32)
    expected = x @ weight.T + bias + (0 if fix is None else fix)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_trainable_floats_are_right(level):
    level, W, stats = make(level)
    if not compose.method(level.terms[0].method).is_trainable:
        pytest.skip("not a trainable method")
    state = compose.compress(level, W, stats)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    x, direction = torch.randn(6, W.shape[1]), torch.randn(6, W.shape[0])

    def loss(tensors):
        y = compose.operator(level, tensors, None, SHAPES[0], torch.float32)(x)
        return (y * direction).sum()

    for name, value in floats(state).items():
        leaf = value.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(state | {name: leaf}), leaf)
        assert torch.isfinite(grad).all() and grad.norm() > 0
        # The output is linear in each tensor alone, so a finite difference is exact.
        step = value.abs().mean() * torch.randn(value.shape)
        slope = loss(state | {name: value + step}) - loss(state | {name: value - step})
        scale = float(grad.norm() * step.norm())
        assert float(slope) / 2 == pytest.approx(float((grad * step).sum()), abs=2e-3 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_asked_for_by_name_of_the_method(name):
    part = compose.method(name)
    for example in part.examples:
        level, W, stats = make(example)
        if compose.needs_stats(level):
            with pytest.raises(ValueError, match=f"{name} needs calibration statistics"):
                compose.compress(level, W, None)
            with pytest.raises(ValueError, match="64 inputs, its statistics have 32"):
                compose.compress(level, W, Stats(stats.gram[:32, :32]))
        else:
            compose.compress(level, W, None)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_parameters_are_refused_by_name(name):
    with pytest.raises(ValueError, match="has no parameter 'colour'"):
        compose.normalize(f"{name}:colour=red")


@pytest.mark.parametrize("level", LEVELS)
def test_tensor_names_leave_room_for_the_term_number(level):
    level, W, stats = make(level)
    assert not any(k.rpartition("_")[2].isdigit() for k in compose.compress(level, W, stats))


@pytest.mark.parametrize("level", EVERY)
def test_weights_with_nan_are_refused(level):
    level, W, stats = make(level)
    W[0, 0] = float("nan")
    with pytest.raises(ValueError, match="contains inf or NaN"):
        compose.compress(level, W, stats)


@pytest.mark.parametrize("level, shape", CASES)
def test_no_more_values_are_kept_than_counted(level, shape):
    level, W, stats = make(level, shape)
    kept = compose.kept_values(level, shape)
    assert kept >= 0 and isinstance(kept, int)
    if len(level.terms) == 1 and level.terms[0].method not in (*FACTORED, "zero"):
        weight = compose.decompress(level, compose.compress(level, W, stats), shape, W.dtype)
        assert int((weight != 0).sum()) <= kept <= W.numel()


@pytest.mark.parametrize(
    ("level", "reason"),
    [
        ("dense + lowrank:rank=4", "dense leaves no error to compress"),
        ("drop + lowrank:rank=4", "drop leaves no error to compress"),
        ("gptq:bits=3,group_size=32 + dense", "dense cannot follow another term"),
        ("gptq:bits=3,group_size=32 + zero", "zero cannot follow another term"),
        ("lowrank:rank=4 + drop", "drop cannot follow another term"),
    ],
)
def test_compositions_that_make_no_sense_are_refused_with_a_reason(level, reason):
    with pytest.raises(ValueError, match=reason):
        compose.normalize(level)
