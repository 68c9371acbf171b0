"""Ordered low-rank training: every rank of one checkpoint is a level."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_evopress import OrderedRanks, RankTruncation
from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.refine.distillation import Sequences
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.objective import fitness_of
from hf_evopress.search.ask_tell import Search
from hf_evopress.search.budget import Budget
from hf_evopress.search.space import SearchSpace
from hf_evopress.store.level_store import Source
from hf_evopress.training.ordered_ranks import (
    cut_ranks,
    lasso_gradient,
    make_ordered,
    ordered_store,
    truncate,
)
from hf_evopress.training.trainer import DistillationTrainer
from hf_evopress.training.tunable import settle

SHARES = (1.0, 0.75, 0.5)


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "logging_steps": 100,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(out), **{**settings, **changes})


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


@pytest.fixture(scope="module")
def start(trained_llama: Any, tokens: Tensor) -> Any:
    """The model at a quarter of the full rank everywhere, whitened."""
    return lowrank(trained_llama, tokens, 1.0)


def lowrank(dense: Any, tokens: Tensor, share: float) -> Any:
    model = copy.deepcopy(dense)
    units = find_units(model)
    levels: Any = {u.name: f"lowrank:rank={round(share * min(u.shape) / 4)}" for u in units}
    plan = Plan(levels, shapes={u.name: u.shape for u in units})
    compress_model(model, plan, tokens)
    attach(model, plan)
    return model


def kl(dense: Any, unseen: Tensor, **models: Any) -> dict[str, float]:
    reports = compare_many(
        {name: model.eval() for name, model in models.items()}, dense, unseen, window=48
    )
    return {name: report.kl_nats for name, report in reports.items()}


def test_one_training_serves_every_rank_better_than_the_svd_of_each(
    trained_llama: Any, start: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(start)
    make_ordered(model)
    DistillationTrainer(
        model,
        arguments(tmp_path),
        train_dataset=Sequences(tokens),
        teacher=trained_llama,
        callbacks=[OrderedRanks()],
    ).train()
    settle(model)
    unseen = text_tokens(8, 48, seed=9).flatten()
    cut = {str(s): copy.deepcopy(model) for s in SHARES}
    for share in SHARES:
        cut_ranks(cut[str(share)], share)
    ours = kl(trained_llama, unseen, **cut)
    svd = kl(trained_llama, unseen, **{str(s): lowrank(trained_llama, tokens, s) for s in SHARES})
    assert all(ours[name] < svd[name] for name in svd)
    assert ours["1.0"] < ours["0.75"] < ours["0.5"]


def test_a_cut_model_is_saved_at_its_ranks(start: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(start)
    whole = {n: layer.state for n, layer in compressed_linears(model).items()}
    make_ordered(model)
    settle(model)
    name = next(iter(whole))
    plan = cut_ranks(model, {name: 5})
    assert str(plan[name]) == "lowrank:rank=5" and len(plan) == len(whole)
    model.save_pretrained(tmp_path)
    layer = compressed_linears(AutoModelForCausalLM.from_pretrained(tmp_path))[name]
    assert torch.equal(layer.A, whole[name]["A"][:5])
    assert torch.equal(layer.B, whole[name]["B"][:, :5])


def test_a_step_trains_the_first_ranks_only(start: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(start)
    name = make_ordered(model)[0]
    layer = model.get_submodule(name)
    before = {k: v.detach().clone() for k, v in layer.state.items()}
    callback = OrderedRanks(least=0.5, full=0.0, seed=4)
    state: Any = type("State", (), {"global_step": 0})
    callback.on_step_begin(None, state, None, model=model)
    n = layer.active
    assert n is not None and 8 <= n < 16
    model(input_ids=tokens[:2], labels=tokens[:2], use_cache=False).loss.backward()
    assert layer.A.grad[:n].any() and not layer.A.grad[n:].any()
    assert layer.B.grad[:, :n].any() and not layer.B.grad[:, n:].any()
    callback.on_step_end(None, state, None, model=model)
    assert layer.active is None
    assert all(torch.equal(v, layer.state[k]) for k, v in before.items())


def test_every_rank_is_a_level_of_the_store(
    trained_llama: Any, start: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = copy.deepcopy(start)
    make_ordered(model)
    settle(model)
    calibrate(trained_llama, tokens[:8], tmp_path / "stats")
    source = Source({"of": "a test"}, lambda block: load_stats(tmp_path / "stats", block))
    store = ordered_store(tmp_path / "store", model, trained_llama, SHARES, source)
    again = ordered_store(tmp_path / "store", model, trained_llama, SHARES, source)
    assert store.index == again.index
    for name, layer in compressed_linears(model).items():
        levels = [level for level in store.levels(name) if not level.is_dense]
        assert len(levels) == len(SHARES)
        errors = [store.scores(name, level)["error"] for level in levels]
        assert errors == sorted(errors, reverse=True)
        for level in levels:
            rank = int(level.terms[0].kwargs["rank"])
            state = store.state(name, level)
            assert torch.equal(state["A"], layer.A[:rank])
            assert sum(8 * t.numel() * t.element_size() for t in state.values()) == (
                compose.cost_bits(level, layer.shape)
            )
        W = trained_llama.get_submodule(name).weight.half().float()
        assert torch.equal(store.weight(name, "dense", torch.float32), W)
    for file in (tmp_path / "store").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        factors = sorted(key[-2:] for key in keys if key.endswith(("/A", "/B")))
        assert factors == ["/A", "/B"]  # all ranks are leading parts of one


def test_a_search_over_the_store_chooses_ranks_and_ships_what_it_scored(
    trained_llama: Any, start: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(start)
    make_ordered(model, ["factors"])  # norms stay the dense model's, which plans are scored in
    options = arguments(tmp_path, max_steps=8)
    words: Any = {"train_dataset": Sequences(tokens), "teacher": trained_llama}
    DistillationTrainer(model, options, callbacks=[OrderedRanks()], **words).train()
    settle(model)
    calibrate(trained_llama, tokens[:8], tmp_path / "stats")
    source = Source({"of": "a search"}, lambda block: load_stats(tmp_path / "stats", block))
    store = ordered_store(tmp_path / "store", model, trained_llama, SHARES, source)
    shapes = {name: unit.shape for name, unit in store.units.items()}
    offered = {
        name: [(x, compose.cost_bits(x, shape)) for x in store.levels(name) if not x.is_dense]
        for name, shape in shapes.items()
    }
    space = SearchSpace.build({name: math.prod(shape) for name, shape in shapes.items()}, offered)
    budget = Budget((space.min_cost + space.max_cost) // 2, "half way")
    pool = text_tokens(8, 48, seed=9)
    evaluator = Evaluator(trained_llama, store, pool, fitness_of("kl"))
    table = [
        [store.scores(gene.units[0], option.level)["error"] for option in gene.options]
        for gene in space.genes
    ]
    settings: dict[str, Any] = {"generations": 2, "tokens": [96, 192]}
    search = Search(space, budget, table=table, n_sequences=8, seq_len=48, **settings)
    while (asked := search.ask()) is not None:
        plans = [space.levels(genome) for genome in asked.genomes]
        search.tell(evaluator.losses(plans, asked.sequences))
    levels = space.levels(search.best)
    assert space.cost(search.best) <= budget.limit and len({*levels.values()}) > 1

    plan = cut_ranks(model, {n: int(x.terms[0].kwargs["rank"]) for n, x in levels.items()})
    assert plan.levels == levels
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    with torch.no_grad():
        for ids in pool[:2]:
            scored = evaluator.logits(levels, ids[None])
            assert torch.allclose(loaded(ids[None]).logits, scored, atol=1e-5)


def test_the_lasso_is_the_gradient_of_the_sum_of_tails() -> None:
    X = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    sum(X[b:].norm() for b in range(6)).backward()
    assert torch.allclose(lasso_gradient(X.detach()), X.grad, atol=1e-6)
    assert torch.isfinite(lasso_gradient(torch.zeros(3, 2))).all()


def test_truncation_keeps_the_best_ranks_in_order(
    trained_llama: Any, start: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = copy.deepcopy(start)
    make_ordered(model)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    W = (layer.B.double() @ layer.A.double()).detach()
    S = torch.linalg.svdvals(W)[:16]
    rank = truncate(layer, error=0.05)
    left = (layer.B.double() @ layer.A.double()).detach()
    lost = float((W - left).square().sum() / W.square().sum())
    assert lost <= 0.05 < float(S[rank - 1 :].square().sum() / S.square().sum())
    assert not layer.A[rank:].any() and torch.linalg.matrix_rank(left) == rank
    sizes = layer.A.norm(dim=1)[:rank]
    assert bool((sizes[:-1] >= sizes[1:] - 1e-5).all())
    pruning = RankTruncation(every=2, error=0.02, nuclear=0.01)
    DistillationTrainer(
        model,
        arguments(tmp_path, max_steps=4),
        train_dataset=Sequences(tokens),
        teacher=trained_llama,
        callbacks=[pruning],
    ).train()
    assert all(1 <= kept < 17 for kept in pruning.ranks.values()) and len(pruning.ranks) == 21


def test_truncation_weighs_columns_with_the_inputs_of_the_step(start: Any, tokens: Tensor) -> None:
    model = copy.deepcopy(start)
    make_ordered(model)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    W, other = (layer.B @ layer.A).detach(), copy.deepcopy(layer)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    callback = RankTruncation(every=2, error=0.05)
    for step in (0, 1):  # two steps of two batches; only the last step counts
        state: Any = type("State", (), {"global_step": step})
        callback.on_step_begin(None, state, None, model=model)
        for batch in (tokens[:2], tokens[2:4]) if step else (tokens[8:12],):
            model(input_ids=batch, use_cache=False)
        state.global_step += 1
        callback.on_step_end(None, state, None, model=model)
    hook.remove()
    squares = torch.cat(seen[1:]).flatten(0, 1).square().mean(0)
    D = (squares / squares.mean()).sqrt()
    left = (layer.B @ layer.A).detach()
    assert float(((W - left) * D).square().sum()) <= 0.05 * float((W * D).square().sum())
    assert truncate(other, error=0.05, D=D) == callback.ranks[name]
    assert torch.allclose(other.B @ other.A, left, atol=1e-5)
    assert not layer._forward_pre_hooks


CALLBACKS = {
    "ordered": lambda: OrderedRanks(lasso=1e-3, seed=2),
    "truncated": lambda: RankTruncation(every=2, error=0.02, nuclear=0.01),
    "truncated, unweighted": lambda: RankTruncation(every=2, error=0.02, weighted=False),
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("step", [3, 4])  # between two truncations, and right after one
def test_a_resumed_run_equals_a_straight_one(
    trained_llama: Any, start: Any, tokens: Tensor, tmp_path: Path, kind: str, step: int
) -> None:
    results = []
    for resume in (None, str(tmp_path / f"checkpoint-{step}")):
        model = copy.deepcopy(start)
        names = make_ordered(model)
        DistillationTrainer(
            model,
            arguments(tmp_path, max_steps=7, save_strategy="steps", save_steps=step),
            train_dataset=Sequences(tokens),
            teacher=trained_llama,
            callbacks=[CALLBACKS[kind]()],
        ).train(resume_from_checkpoint=resume)
        results.append(model.state_dict())
    straight, resumed = results
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[name]) for name, t in straight.items())
    before = start.state_dict()
    for name in names:
        assert straight[f"{name}.A"].dtype == torch.float32  # as trained, not as stored
        assert not torch.equal(straight[f"{name}.A"], before[f"{name}.A"].float())


def test_bad_requests_say_what_to_change(trained_llama: Any, start: Any) -> None:
    with pytest.raises(ValueError, match="the model's are all dense"):
        make_ordered(copy.deepcopy(trained_llama))
    with pytest.raises(ValueError, match="least=0"):
        OrderedRanks(least=0)
    with pytest.raises(ValueError, match="every=0"):
        RankTruncation(every=0)
    with pytest.raises(ValueError, match="ranks 1 to 16, got 99"):
        cut_ranks(copy.deepcopy(start), {"model.layers.0.mlp.up_proj": 99})
    with pytest.raises(ValueError, match="nowhere is no layer at a lowrank level"):
        cut_ranks(copy.deepcopy(start), {"nowhere": 4})
    with pytest.raises(ValueError, match=r"call make_ordered\(model\) first"):
        OrderedRanks().on_train_begin(None, None, None, model=start)
