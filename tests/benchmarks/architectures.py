"""Which models it works on: the whole line over a tiny model of every architecture.

    python tests/benchmarks/architectures.py                    # all that transformers knows
    python tests/benchmarks/architectures.py gpt2 qwen3_next    # some

For each causal language model of transformers a config of a few thousand weights is made up, by
shrinking whatever sizes its defaults have; the model is saved, calibrated, compressed to 4.2 bits,
exported, reloaded and compared bit for bit with what was scored. Each runs in a process of its own.
Refused: by an error that says why. A model whose config cannot be made up this way says nothing
about us: those are listed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_evopress.jobs import pipeline
from hf_evopress.recipes.recipe import Recipe
from tests.conftest import byte_level_tokenizer, make_structured_text

SECONDS = 150  # for one architecture
MOST_WEIGHTS = 30_000_000  # the sizes of some cannot be told from their names

# What sizes are called, and what they become; those that a config lacks are passed over.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "first_k_dense_replace"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "sliding_window", "rotary_dim"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 256),
    "hidden_size_per_layer_input": 16,
    "word_embed_proj_dim": 64,
    "num_nextn_predict_layers": 0,
    "is_decoder": True,  # BERT kin are encoders otherwise, which are no causal language models
}
# What cannot be told from names.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": 16},
    "nemotron_h": {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4, "n_groups": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--out", help="JSON file to write")
    words = parser.parse_args()
    found: dict[str, list[str]] = {}
    for name in words.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[name] = in_own_process(one, name)
        print(f"{name:28} {found[name][0]:12} {found[name][1]}", flush=True)
        if words.out:
            Path(words.out).write_text(json.dumps(found, indent=1))
    counts = {kind: sum(k == kind for k, _ in found.values()) for kind, _ in found.values()}
    print("\n" + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))


def one(name: str) -> tuple[str, str]:
    """Return works, refused, fails or not made, and what was compressed or what went wrong."""
    torch.set_num_threads(1)
    try:
        model = tiny(name)
        n = sum(p.numel() for p in model.parameters())
        if n > MOST_WEIGHTS:
            return "not made", f"{n / 1e6:.0f} million weights"
        model(input_ids=torch.arange(1, 9)[None], use_cache=False)
    except Exception as error:
        return "not made", _told(error)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = pipeline.compress(recipe(Path(folder), model))
        except ValueError as error:
            return "refused", _told(error)
        except Exception as error:
            return "fails", _told(error)
    share = sum(rows * columns for rows, columns in result.plan.shapes.values()) / n
    return "works", f"{len(result.plan.levels)} units, {share:.0%} of the weights"


def tiny(name: str) -> Any:
    """Return a random model of the architecture, as small as its config's names can say."""
    config = CONFIG_MAPPING[name]
    defaults = config().to_dict()
    if isinstance(defaults.get("text_config"), dict):
        raise ValueError("a model of several parts")
    plain = {k for k, v in defaults.items() if v is not None and not isinstance(v, (list, dict))}
    settings = {key: value for key, value in SIZES.items() if key in plain}
    if "kv_lora_rank" in defaults:
        settings["num_key_value_heads"] = settings.get("num_attention_heads", 4)
    if types := defaults.get("layer_types"):
        kinds = list(dict.fromkeys(types))
        settings["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            settings |= {key: len(settings["layer_types"])} if key in plain else {}
    torch.manual_seed(0)
    made = config(**(settings | SPECIAL.get(name, {})))
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


def recipe(folder: Path, model: Any) -> Recipe:
    """Return the recipe that compresses `model`, which is saved in `folder`."""
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    byte_level_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(make_structured_text(120))
    counts = {"seq_len": 32, "calibration": 8, "search": 4, "heldout": 2, "test": 4}
    return Recipe.from_dict(
        {
            "model": str(folder / "dense"),
            "out": str(folder / "out"),
            "budget": {"bits": 4.2},
            "levels": [f"gptq:bits={bits},group_size=-1" for bits in (2, 3, 4)],
            "data": {"sources": [str(folder / "text.txt")], **counts},
            "search": {"strategy": "knapsack", "sensitivity_tokens": 64},
        }
    )


def in_own_process(function: Callable[[str], tuple[str, str]], word: str) -> list[str]:
    """Return what function(word) returns in a forked process, which may die or take too long."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silence, stream)
        signal.alarm(SECONDS)
        os.write(writing, json.dumps(function(word)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else ["fails", f"died, or took more than {SECONDS} s"]


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:200]} ({Path(where.filename).name}:{where.lineno})"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    main()
