"""Training methods on a real model, each against the yardstick of its paper, on unseen text.

    python tests/benchmarks/training_methods.py MODEL --data calibration.txt --test wiki.test.raw \
        --work DIR --parts prune pv ordered quest structured

Every arm of a part distils the dense model for the same steps over the same sequences, with the
same schedule; KL from the dense model in nats per token on windows of the test text.

prune: gradual magnitude pruning to 60 %, with and without the PQ-index's limit, against pruning at
once with the same steps, and after as many healing steps.
pv: codes and scales of 2-bit GPTQ (V-step and P-step) against scales alone, and against codes that
are the rounding of a float weight (straight-through).
ordered: ordered low-rank training, its checkpoint cut to three sizes, against a whitened SVD
of each.
truncate: low-rank factors cut by Trained Rank Pruning as they are trained, against a whitened SVD
of the same ranks, trained as long and not trained.
quest: --bits trained by QuEST against GPTQ at the same bytes, with and without trained scales; with
--activation-bits inputs are rounded as well, in training and in a row of its own.
alignment: cosine between the gradient of the dense weights and QuEST's, on one batch, beside that
of straight-through estimation with the same codes, and with a row's largest weight as the step.
structured: three quarters of each MLP's channels, learned by gates while LoRA is trained, against
those of the largest output in the dense model with LoRA trained as long, and not trained at all.
groups: the same of key-value groups, all but one of each block's.
levels: every layer at one level, calibrated on the same sequences, not trained (--level): what the
bytes of the others are worth elsewhere.
heal: tensor networks of shares of the parameters (--shares), their factors and the norms trained
(CompactifAI), against whitened SVDs of as many bytes, trained alike.
fold: MLPs of half the values at random places (STABLE-RPS), of the dense ones or random, against
MLPs of half the channels, random or those of the largest output; all weights trained, at --rate
and at --random-rate, since random ones want larger steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_evopress.adapters.by_name import load
from hf_evopress.base.fingerprint import tensor_fingerprint, text_fingerprint
from hf_evopress.calibration.data import load_tokens, tokenize_file
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.methods.maths.codes import unpack_grid
from hf_evopress.methods.maths.packing import pack, unpack
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.refine.distillation import Targets, precompute_targets
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.training.trainer import DistillationTrainer

ATTENTION = "*self_attn*"


class Bench:
    """The dense model, its targets on the training text, and the test text."""

    def __init__(self, words: argparse.Namespace) -> None:
        self.words = words
        self.dense = load(words.model)
        tokenizer = AutoTokenizer.from_pretrained(words.model)
        self.tokens: Tensor = load_tokens(
            [words.data], tokenizer, n_sequences=words.sequences, seq_len=words.seq_len, seed=0
        )
        folder = words.work / f"targets-{words.sequences}-{words.seq_len}"
        self.data = Targets(precompute_targets(self.dense, self.tokens, folder))
        self.test = tokenize_file(words.test, tokenizer)

    def model(self, *, trained: bool = False) -> Any:
        return copy.deepcopy(self.dense).requires_grad_(trained)

    def train(self, model: Any, *, steps: int | None = None, **options: Any) -> Any:
        """Return the trainer after `steps` steps; learning_rate and schedule are in options."""
        rate, schedule = options.pop("rate"), options.pop("schedule", "linear")
        args = TrainingArguments(
            output_dir=str(self.words.work / "trainer"),
            max_steps=steps or self.words.steps,
            per_device_train_batch_size=self.words.batch,
            learning_rate=rate,
            lr_scheduler_type=schedule,
            warmup_steps=0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=self.words.bf16,
            seed=0,
        )
        trainer = DistillationTrainer(model, args, train_dataset=self.data, **options)
        trainer.train()
        return trainer

    def kl(self, *models: Any) -> list[str]:
        """Return the KL of each model, and its standard error, on the same windows."""
        words = self.words
        reports = compare_many(
            {str(i): model.eval() for i, model in enumerate(models)},
            self.dense,
            self.test,
            window=words.window,
            max_windows=words.windows,
        )
        found = []
        for report in reports.values():
            error = report.kl_standard_error  # None where there is one window
            found.append(f"{report.kl_nats:.4f}" + (f" +- {error:.4f}" if error else ""))
        return found


def prune(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.gradual_pruning import GradualPruning, PQStop, to_sparse

    steps, rate = bench.words.steps, bench.words.rate
    ramp = steps // 2
    arms: dict[str, tuple[int, dict[str, Any]]] = {
        "at once, same steps": (steps, {"end": 0, "start": 0.6}),
        "at once, same healing": (steps - ramp, {"end": 0, "start": 0.6}),
        "gradual": (steps, {"end": ramp, "every": max(1, ramp // 6)}),
        "gradual, PQ-index": (steps, {"end": ramp, "every": max(1, ramp // 6), "stop": PQStop()}),
    }
    found: dict[str, Any] = {}
    for name in bench.words.arms or arms:
        n, options = arms[name]
        model, pruning = bench.model(trained=True), GradualPruning(0.6, **options)
        bench.train(model, steps=n, rate=rate, callbacks=[pruning], schedule="constant")
        zeros = pruning.sparsities.values()
        to_sparse(model)
        found[name] = [*bench.kl(model), f"zeros {min(zeros):.3f} to {max(zeros):.3f}"]
        print(name, found[name], flush=True)
    return found


def pv(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.pv_tuning import PVTuning
    from hf_evopress.training.tunable import make_tunable, settle

    class ScalesAlone(torch.optim.AdamW):
        def __init__(self, model: Any) -> None:
            make_tunable(model)
            floats = [p for p in model.parameters() if p.requires_grad]
            super().__init__(floats, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    class StraightThrough(ScalesAlone):
        """A float weight beside the codes, which are its rounding; its gradient is theirs."""

        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.layers = [Rounded(layer) for layer in compressed_linears(model).values()]
            weights = [layer.weight for layer in self.layers]
            self.add_param_group({"params": weights, "lr": bench.words.latent_rate})

        @property
        def n_changed(self) -> int:
            return sum(layer.write_codes() for layer in self.layers)

    start = packed(bench, bench.words.start)
    found: dict[str, Any] = {"before": bench.kl(start)}
    print(found, flush=True)
    arms: dict[str, Callable[[Any], Any]] = {
        "V: scales and norms": ScalesAlone,
        "P and V": partial(PVTuning, trust=bench.words.trust),
        "straight-through": StraightThrough,
    }
    for name in bench.words.arms or arms:
        model = copy.deepcopy(start)
        optimizer = arms[name](model)
        bench.train(model, rate=1e-4, optimizers=(optimizer, None))
        changed = getattr(optimizer, "n_changed", 0)
        settle(model)
        found[name] = [*bench.kl(model), f"{changed} codes changed"]
        print(name, found[name], flush=True)
    return found


class Rounded:
    """Gives a layer of scalar codes a float weight, which it rounds to its grid as it computes."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        _, self.params, self.state, _ = next(compose.terms(layer.level, layer.state))
        self.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Tensor).clone())
        layer.forward = self.forward

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes of the weight, scales and zero points, all (out, groups, in a group)."""
        scale, zero = unpack_grid(self.layer.state, self.layer.shape, **self.params)
        W = self.weight.detach().view(*scale.shape[:2], -1)
        q = (W / scale.detach() + zero).round_().clamp_(0, 2 ** self.params["bits"] - 1)
        return q, scale, zero

    def forward(self, x: Tensor) -> Tensor:
        q, scale, zero = self.codes()
        W = ((q - zero) * scale).view(self.layer.shape)
        W = W + (self.weight - self.weight.detach())
        return torch.nn.functional.linear(x, W, self.layer.bias)

    @torch.no_grad()
    def write_codes(self) -> int:
        """Write the codes of the weight into the layer; return how many are new."""
        q = self.codes()[0].view(self.layer.shape).to(torch.uint8)
        old = unpack(self.state["codes"], self.params["bits"], self.layer.shape[1])
        packed = pack(q, self.params["bits"])
        self.layer.get_parameter("codes").copy_(packed.view_as(self.state["codes"]))
        self.layer.__dict__.pop("forward", None)
        return int((q != old).sum())


def ordered(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.ordered_ranks import OrderedRanks, cut_ranks, make_ordered
    from hf_evopress.training.tunable import settle

    model = packed(bench, partial(low_rank, share=0.8))
    make_ordered(model)
    bench.train(model, rate=bench.words.rate, callbacks=[OrderedRanks(least=0.5)])
    settle(model)
    found: dict[str, Any] = {}
    for share in (0.8, 0.6, 0.4):
        ours = copy.deepcopy(model)
        cut_ranks(ours, share / 0.8)
        svd = packed(bench, partial(low_rank, share=share))
        found[f"{share} of the parameters: ordered, whitened SVD"] = bench.kl(ours, svd)
        print(share, found, flush=True)
    return found


def truncate(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.ordered_ranks import RankTruncation, cut_ranks
    from hf_evopress.training.tunable import make_tunable, settle

    words = bench.words

    def trained(model: Any, *callbacks: Any) -> Any:
        make_tunable(model, ["factors", "norms"])
        bench.train(model, rate=words.rate, callbacks=list(callbacks))
        settle(model)
        return model

    truncation = RankTruncation(every=words.steps // 4, error=words.error, weighted=not words.plain)
    model = trained(packed(bench, partial(low_rank, share=0.8)), truncation)
    cut_ranks(model, truncation.ranks)
    svd = packed(bench, lambda unit: f"lowrank:rank={truncation.ranks[unit.name]}")
    healed = trained(copy.deepcopy(svd))
    names = ("truncated as it trains", "whitened SVD", "whitened SVD, trained")
    found: dict[str, Any] = dict(zip(names, bench.kl(model, svd, healed), strict=True))
    return found | {"bits": round(stored_bits(model), 3)}


def quest(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.quest import make_quest, to_rotated
    from hf_evopress.training.tunable import make_tunable, settle

    bits, inputs = bench.words.bits, bench.words.activation_bits
    model = bench.model(trained=True)
    make_quest(model, bits=bits, activation_bits=inputs)
    found: dict[str, Any] = {}
    if inputs is not None:
        found[f"inputs at {inputs} bits, before"] = bench.kl(model)
    losses = bench.train(model, rate=bench.words.rate).state.log_history
    if inputs is not None:
        found[f"inputs at {inputs} bits, after"] = bench.kl(model)
    found["losses"] = [round(row["loss"], 3) for row in losses if "loss" in row]
    print(found, flush=True)
    to_rotated(model)
    untrained = packed(bench, f"hadamard:bits={bits}")
    gptq = packed(bench, f"gptq:bits={bits},group_size=-1")
    tuned = copy.deepcopy(gptq)
    make_tunable(tuned)
    bench.train(tuned, rate=1e-4)
    settle(tuned)
    names = ("QuEST", "hadamard, untrained", "GPTQ", "GPTQ, scales and norms trained")
    return found | dict(zip(names, bench.kl(model, untrained, gptq, tuned), strict=True))


def alignment(bench: Bench) -> dict[str, Any]:
    from hf_evopress.methods.maths.quest import RotatedRows
    from hf_evopress.training.quest import QuESTLinear, make_quest

    class Same(QuESTLinear):
        """Computes what QuEST does; the gradient of what it computes with is that of the weight."""

        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                Y, seed, block = self.rotated_weight(), self.params["seed"], self.params["block"]
                rounded = RotatedRows.apply(Y, seed, block, True)
            W = self.weight + (rounded - self.weight).detach()
            return torch.nn.functional.linear(input, W, self.bias)

    class Largest(torch.nn.Linear):
        """A row's largest weight sets the step, as is usual; the gradient passes."""

        def forward(self, input: Tensor) -> Tensor:
            W, half = self.weight, 2 ** (bits - 1)
            step = W.detach().abs().amax(1, keepdim=True) / (half - 0.5)
            rounded = (W.detach() / step - 0.5).round().clamp(-half, half - 1).add(0.5) * step
            W = W + (rounded - W).detach()
            return torch.nn.functional.linear(input, W, self.bias)

    ids = bench.tokens[: bench.words.batch]
    found: dict[str, Any] = {}
    names = [unit.name for unit in find_units(bench.dense)]
    for bits in (2, 3, 4):
        gradients = {}
        for kind in ("dense", "QuEST", "straight-through, same codes", "largest weight"):
            model = bench.model(trained=True)
            if kind not in ("dense", "largest weight"):
                make_quest(model, bits=bits)
            for name in names if kind in ("straight-through, same codes", "largest weight") else ():
                model.get_submodule(name).__class__ = Largest if kind == "largest weight" else Same
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            parts = [model.get_submodule(name).weight.grad.flatten() for name in names]
            gradients[kind] = torch.cat(parts)
        dense = gradients.pop("dense")
        found[f"{bits} bits"] = {
            kind: round(float(torch.nn.functional.cosine_similarity(g, dense, dim=0)), 4)
            for kind, g in gradients.items()
        }
        print(found, flush=True)
    return found


def structured(bench: Bench, kind: str = "channels") -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    from hf_evopress.training.structured_masks import StructuredPruning, slice_model

    class Fixed(StructuredPruning):
        """Keeps what has the largest scores from the first step."""

        def install(self, model: Any) -> None:
            super().install(model)
            (gates,) = self.gates.values()
            gates.log_alpha.data.copy_(scores)
            gates.harden()

    scores = output_sizes(bench, kind)
    keep = scores.shape[1] * 3 // 4
    target = {"kv_groups" if kind == "kv" else kind: keep}
    largest = torch.zeros_like(scores).scatter_(1, scores.topk(keep).indices, 1.0)
    arms: dict[str, tuple[StructuredPruning, int]] = {
        "largest outputs, not trained": (Fixed(**target, end=0), 0),
        "largest outputs": (Fixed(**target, end=0), bench.words.steps),
        "learned": (StructuredPruning(**target), bench.words.steps),
    }
    found: dict[str, Any] = {}
    for name, (pruning, steps) in arms.items():
        torch.manual_seed(0)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(bench.model(), lora)
        if steps:
            bench.train(model, rate=5e-4, callbacks=[pruning])
        else:
            pruning.install(model)
        kept = pruning.gates[kind].mask
        assert kept is not None  # training has ended
        small = slice_model(model.merge_and_unload(), pruning)
        n_weights = sum(p.numel() for p in small.parameters())
        same = float((kept * largest).sum() / largest.sum())
        found[name] = [*bench.kl(small), f"{n_weights} weights", f"{same:.3f} of the largest"]
        print(name, found[name], flush=True)
    return found


@torch.no_grad()
def output_sizes(bench: Bench, kind: str = "channels") -> Tensor:
    """Return (blocks, n): the mean square of what each channel, or key-value group, adds to a
    block's output."""
    blocks = bench.dense.model.layers
    linears = [b.mlp.down_proj if kind == "channels" else b.self_attn.o_proj for b in blocks]
    sums = [torch.zeros(p.in_features) for p in linears]

    def adds_to(total: Tensor) -> Callable[..., None]:
        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            total.add_(args[0].square().flatten(0, -2).sum(0))

        return note

    hooks = [p.register_forward_pre_hook(adds_to(s)) for p, s in zip(linears, sums, strict=True)]
    for ids in bench.tokens[:8]:
        bench.dense(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    columns = [p.weight.square().sum(0) for p in linears]
    sizes = torch.stack([s * c for s, c in zip(sums, columns, strict=True)])
    n_groups = bench.dense.config.num_key_value_heads
    return sizes if kind == "channels" else sizes.unflatten(1, (n_groups, -1)).sum(2)


def packed(bench: Bench, level: str | Callable[[Any], str]) -> Any:
    """Return the dense model with every decoder layer at `level`, by default calibration.

    It is kept in --work for other runs.
    """
    units = find_units(bench.dense)
    levels: dict[str, Any] = {u.name: level if isinstance(level, str) else level(u) for u in units}
    tokens = bench.tokens[: bench.words.calibration]
    name = text_fingerprint(str(levels), tensor_fingerprint(tokens))
    folder = bench.words.work / "packed" / name
    if not (folder / "config.json").is_file():
        model, plan = bench.model(), Plan(levels, shapes={u.name: u.shape for u in units})
        compress_model(model, plan, tokens)
        attach(model, plan)
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def levels(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for level in bench.words.level:
        model = packed(bench, level)
        found[level] = [*bench.kl(model), f"{stored_bits(model):.3f} bits"]
        print(level, found[level], flush=True)
    return found


def stored_bits(model: Any) -> float:
    """Return the stored bits per weight of the layers, factors in 16 bits."""
    layers = compressed_linears(model).values()
    bits = sum(compose.cost_bits(layer.level, layer.shape) for layer in layers)
    return bits / sum(layer.shape[0] * layer.shape[1] for layer in layers)


def heal(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.tunable import make_tunable, settle

    found: dict[str, Any] = {}
    for share in bench.words.shares:
        network = f"mpo:bits={16 * share},factors=bfloat16"
        for name, level in (("mpo", network), ("lowrank", partial(low_rank, share=share))):
            model = packed(bench, level)
            before, bits = bench.kl(model), stored_bits(model)
            make_tunable(model, ["factors", "norms"])
            bench.train(model, rate=bench.words.rate)
            settle(model)
            name = f"{name}, {share} of the parameters"
            found[name] = {"before": before, "healed": bench.kl(model), "bits": round(bits, 3)}
            print(name, found[name], flush=True)
    return found


def fold(bench: Bench) -> dict[str, Any]:
    from hf_evopress.training.random_fold import make_folded, to_folded

    def folded(model: Any) -> Any:
        make_folded(model, share=0.5, skip=[ATTENTION])
        return model

    words = bench.words
    starts: dict[str, Callable[[Any], Any]] = {
        "folded": folded,
        "folded, random values": lambda model: folded(random_mlps(model)),
        "small dense, random": lambda model: random_mlps(small_mlps(bench, model)),
        "small dense, largest outputs": partial(small_mlps, bench),
    }
    arms = {f"{n}, {r}": (m, r) for n, m in starts.items() for r in (words.rate, words.random_rate)}
    found: dict[str, Any] = {}
    for name in words.arms or arms:
        make, rate = arms[name]
        torch.manual_seed(0)
        model = make(bench.model(trained=True))
        before, n_trained = bench.kl(model), sum(p.numel() for p in model.parameters())
        bench.train(model, rate=rate)
        if "folded" in name:
            to_folded(model)
        found[name] = {"before": before, "trained": bench.kl(model), "numbers": n_trained}
        print(name, found[name], flush=True)
    return found


def random_mlps(model: Any) -> Any:
    """Return `model` with MLPs as its config starts them."""
    for block in model.model.layers:
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=model.config.initializer_range)
    return model


@torch.no_grad()
def small_mlps(bench: Bench, model: Any) -> Any:
    """Return `model` with those half of each MLP's channels that add most to a block's output."""
    for block, sizes in zip(model.model.layers, output_sizes(bench), strict=True):
        mlp, some = block.mlp, sizes.topk(len(sizes) // 2).indices.sort().values
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[some].clone())
            linear.out_features = len(some)
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, some].clone())
        mlp.down_proj.in_features = len(some)
    return model


def low_rank(unit: Any, share: float) -> str:
    """Return the low-rank level of a share of the weight's parameters."""
    return f"lowrank:rank={round(share * unit.n_weights / sum(unit.shape))}"


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "prune": prune,
    "pv": pv,
    "ordered": ordered,
    "quest": quest,
    "structured": structured,
    "truncate": truncate,
    "groups": partial(structured, kind="kv"),
    "levels": levels,
    "heal": heal,
    "fold": fold,
    "alignment": alignment,
}


def main() -> None:
    words = arguments()
    words.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(words)
    for part in words.parts:
        torch.manual_seed(0)
        start = time.process_time()
        figures = PARTS[part](bench)
        figures["cpu_seconds"] = round(time.process_time() - start)
        print(f"{part}: {json.dumps(figures)}", flush=True)
        (words.work / f"{part}.json").write_text(json.dumps(figures, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text to distil on")
    parser.add_argument("--test", required=True, help="text to measure on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=list(PARTS)[:5], choices=list(PARTS))
    parser.add_argument("--level", action="extend", nargs="+", default=[], help="of levels")
    parser.add_argument("--arms", nargs="+", help="of prune, pv and fold; default: all")
    parser.add_argument("--start", default="gptq:bits=2,group_size=64", help="level, of pv")
    parser.add_argument("--trust", type=float, default=2e-2, help="of pv")
    parser.add_argument("--latent-rate", type=float, default=1e-3, help="of pv, straight-through")
    parser.add_argument("--bits", type=int, default=3, help="of quest")
    parser.add_argument("--activation-bits", type=int, help="of quest; default: not rounded")
    parser.add_argument("--error", type=float, default=1e-2, help="of truncate, at each cut")
    parser.add_argument("--plain", action="store_true", help="truncate as the paper does")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5], help="of heal")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--calibration", type=int, help="of the sequences; default: all")
    parser.add_argument("--rate", type=float, default=5e-5, help="of dense weights")
    parser.add_argument("--random-rate", type=float, default=5e-4, help="of fold")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
