"""What the evaluator scores is what ships, and shared work changes no number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_evopress.base.ranks import Ranks
from hf_evopress.methods import compose
from hf_evopress.methods.menu import menus
from hf_evopress.models.ends import find_ends
from hf_evopress.models.stream import BlockStream
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.scoring.fitness.perplexity import Perplexity
from hf_evopress.store.level_store import LevelStore, Source

LEVELS = [f"rtn:bits={b},group_size=32" for b in (2, 3, 4)]
Made = tuple[nn.Module, LevelStore, Tensor]


@pytest.fixture(scope="module")
def made(
    trained_llama: nn.Module,
    text_tokens: Callable[..., Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    model = copy.deepcopy(trained_llama)
    units = find_units(model)
    folder: Path = tmp_path_factory.mktemp("store")
    offered = menus({u.name: u.shape for u in units}, LEVELS)
    store = LevelStore.build(folder, model, units, offered, Source({}, lambda block: {}))
    return model, store, text_tokens(6, 48, seed=3)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., nn.Module],
    text_tokens: Callable[..., Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """A store of all linear layers, the embedding and the head."""
    model = tiny_model("llama", tie_word_embeddings=request.param)
    units = [*find_units(model), *find_ends(model)]
    offered = menus({u.name: u.shape for u in units}, LEVELS)
    source = Source({}, lambda block: {})
    store = LevelStore.build(tmp_path_factory.mktemp("whole"), model, units, offered, source)
    return model, store, text_tokens(4, 32, seed=3)


@pytest.mark.parametrize(
    "fitness", [KL(top_k=0), KL(top_k=16), KL(top_k=16, columns=64), Perplexity()]
)
def test_embedding_and_head_are_scored_as_weights_that_are_replaced(
    fitness: Any, whole: Made
) -> None:
    model, store, tokens = whole
    ends = [unit.name for unit in store.units.values() if unit.is_end]
    plans = [_plan(store, seed) for seed in range(3)]
    for end in ends:  # all else alike: hidden states are shared where only the head differs
        plans += [{**plans[0], end: level} for level in store.levels(end)]
    found = Evaluator(model, store, tokens, fitness).losses(plans, [2, 0])
    evaluator = Evaluator(model, store, tokens, fitness)
    assert found == [evaluator.losses([plan], [2, 0])[0] for plan in plans]
    for plan, losses in zip(plans, found, strict=True):
        expected = evaluator_of(_reference(model, store, plan), model, store, tokens, fitness)
        assert losses == pytest.approx(expected, rel=1e-4)


def evaluator_of(
    changed: nn.Module, model: nn.Module, store: LevelStore, tokens: Tensor, fitness: Any
) -> list[float]:
    """Return the losses of a dense model against the targets of another."""
    targets = Evaluator(model, store, tokens, fitness)
    targets.losses([{}], [2, 0])
    judge = Evaluator(changed, store, tokens, fitness)
    judge._targets = targets._targets
    return judge.losses([{}], [2, 0])[0]


def _plan(store: LevelStore, seed: int) -> dict[str, Level]:
    g = torch.Generator().manual_seed(seed)
    return {u: store.levels(u)[int(torch.randint(3, (1,), generator=g))] for u in store.units}


def _reference(model: nn.Module, store: LevelStore, plan: dict[str, Level]) -> nn.Module:
    changed = copy.deepcopy(model)
    for unit, level in plan.items():
        changed.get_submodule(unit).weight.data = store.weight(unit, level, torch.float32)
    return changed


@torch.no_grad()
def test_losses_are_those_of_a_model_with_the_weights_replaced(made: Made) -> None:
    model, store, tokens = made
    plans = [_plan(store, s) for s in range(4)]
    evaluator = Evaluator(model, store, tokens, KL(top_k=0))
    chosen = [4, 0, 3]
    found = evaluator.losses(plans, chosen)
    for plan, losses in zip(plans, found, strict=True):
        changed = _reference(model, store, plan)
        for number, loss in zip(chosen, losses, strict=True):
            ids = tokens[number : number + 1]
            p, q = (m(ids).logits[0].log_softmax(-1) for m in (model, changed))
            assert loss == pytest.approx(
                float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-6
            )


def test_logits_equal_bit_for_bit_those_of_the_replaced_weights(made: Made) -> None:
    model, store, tokens = made
    plan = _plan(store, 9)
    with torch.no_grad():
        expected = _reference(model, store, plan)(tokens).logits
    assert torch.equal(Evaluator(model, store, tokens, KL()).logits(plan, tokens), expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_neox", "opt", "phi3"])
def test_the_head_in_slices_of_positions_gives_the_same_logits(
    tiny_model: Callable[..., nn.Module], text_tokens: Callable[..., Tensor], arch: str
) -> None:
    stream, ids = BlockStream(tiny_model(arch)), text_tokens(1, 40)
    with torch.no_grad():
        hidden = stream.embed(ids)
        for block in range(stream.n_blocks):
            hidden = stream.run_block(block, hidden)
        parts = [stream.head(ids[:, p], hidden[:, p]) for p in (slice(0, 16), slice(16, 40))]
        torch.testing.assert_close(torch.cat(parts, 1), stream.head(ids, hidden))


@pytest.mark.parametrize("hidden_bytes", [1, 100_000, 1 << 30])
def test_companions_and_memory_do_not_change_a_bit_of_a_loss(
    made: Made, monkeypatch: pytest.MonkeyPatch, hidden_bytes: int
) -> None:
    monkeypatch.setattr("hf_evopress.scoring.evaluator.BATCH_TOKENS", 100)
    model, store, tokens = made
    plans = [_plan(store, s) for s in (0, 1, 2, 1, 3)]
    small = Evaluator(model, store, tokens, KL(), hidden_bytes=hidden_bytes, cache_bytes=1)
    together = small.losses(plans, range(6))
    alone = [Evaluator(model, store, tokens, KL()).losses([plan], range(6))[0] for plan in plans]
    assert together == alone and together[1] == together[3] != together[0]


def test_several_processes_divide_the_work_and_add_up_to_the_same_bits(made: Made) -> None:
    model, store, tokens = made
    plans = [_plan(store, s) for s in range(5)]
    whole = Evaluator(model, store, tokens, KL()).losses(plans, range(6))
    for n_plans, world in ((5, 2), (5, 3), (2, 3), (1, 4)):
        parts = [
            Evaluator(model, store, tokens, KL(), ranks=_Part(rank, world)).losses(
                plans[:n_plans], range(6)
            )
            for rank in range(world)
        ]
        assert torch.tensor(parts, dtype=torch.float64).sum(0).tolist() == whole[:n_plans]


class _Part(Ranks):
    """A process that does its share and is told nothing of the others'."""

    def add_up(self, table: Tensor) -> None:
        pass

    def check_same(self, what: str, value: object) -> None:
        pass


def test_plans_that_agree_on_a_prefix_run_it_once(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store, tokens = made
    base = _plan(store, 1)
    last = [u.name for u in store.units.values() if u.block == 2]
    plans = [{**base, last[i]: level} for i in range(3) for level in store.levels(last[i])]
    evaluator = Evaluator(model, store, tokens, KL())
    evaluator.losses(plans[:1], [0, 1])  # the dense model has run
    runs: list[int] = []
    run_block = evaluator.stream.run_block
    monkeypatch.setattr(
        evaluator.stream, "run_block", lambda i, *given: (runs.append(i), run_block(i, *given))[1]
    )
    evaluator.losses(plans, [0, 1])
    distinct = len({tuple(str(p[u]) for u in last) for p in plans})
    assert runs.count(0) == runs.count(1) == 1 and runs.count(2) == distinct


def test_the_dense_plan_has_no_loss_and_the_model_is_whole_after(made: Made) -> None:
    model, store, tokens = made
    evaluator = Evaluator(model, store, tokens, KL())
    dense = {u: Level.parse("dense") for u in store.units}
    assert evaluator.losses([dense], [0, 1])[0] == pytest.approx([0.0, 0.0], abs=1e-6)
    evaluator.losses([_plan(store, 2)], [0, 1])
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_sequence_that_the_pool_lacks_is_refused(made: Made) -> None:
    model, store, tokens = made
    with pytest.raises(ValueError, match="sequences 0 to 5, not 6"):
        Evaluator(model, store, tokens, KL()).losses([_plan(store, 0)], [5, 6])


def test_all_sampled_columns_give_the_loss_of_the_whole_head(made: Made) -> None:
    model, store, tokens = made
    plans = [_plan(store, s) for s in range(3)]
    whole = Evaluator(model, store, tokens, KL(top_k=16)).losses(plans, [1, 2])
    some = Evaluator(model, store, tokens, KL(top_k=16, columns=256)).losses(plans, [1, 2])
    torch.testing.assert_close(torch.tensor(some), torch.tensor(whole), rtol=1e-4, atol=1e-6)
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_head_that_is_capped_cannot_be_taken_by_columns(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store, tokens = made
    evaluator = Evaluator(model, store, tokens, KL(columns=16))
    head = evaluator._head
    monkeypatch.setattr(evaluator, "_head", lambda *given: 0.5 * head(*given))
    with pytest.raises(ValueError, match="soft cap"):
        evaluator.losses([_plan(store, 0)], [0])


def test_a_fitness_can_judge_the_whole_model_at_a_plan(made: Made) -> None:
    class Distance(Perplexity):
        judges_models = True

        def of_model(self, model: Any) -> float:
            return float(model(tokens[:1]).logits.square().mean())

    model, store, tokens = made
    plans = [_plan(store, s) for s in range(2)]
    found = Evaluator(model, store, tokens, Distance()).losses(plans, [0, 1])
    for plan, row in zip(plans, found, strict=True):
        expected = _reference(model, store, plan)(tokens[:1]).logits.square().mean()
        assert row == [float(expected)] * 2


def test_more_bits_lose_less(made: Made) -> None:
    model, store, tokens = made
    plans = [{u: compose.normalize(level) for u in store.units} for level in LEVELS]
    two, three, four = (
        sum(x) for x in Evaluator(model, store, tokens, KL()).losses(plans, range(6))
    )
    assert two > three > four > 0
