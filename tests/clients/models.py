"""Make the models that the clients load: python tests/clients/models.py FOLDER

chat/ a causal language model with a chat template, embed/ an embedding model in the layout of
sentence-transformers, both random, tiny and compressed; *.jsonl, what the trainers train on. Beside
each model `expected.json`: a few of the numbers that it puts out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["HF_EVOPRESS_RUNTIME"] = "auto"  # what clients have; tests have another

from tests.clients.served import HEAD_DIM, make_served, make_smollm2
from tests.conftest import byte_level_tokenizer, make_structured_text, make_tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def main(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    folder.mkdir(parents=True)
    text = make_structured_text(200)
    (folder / "text.txt").write_text(text)
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = "<eos>", TEMPLATE
    torch.manual_seed(0)
    chat: Any = make_tiny_model("llama")
    compress(folder, "chat", chat, tokenizer)
    config = AutoConfig.for_model(
        "bert", vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    embed = AutoModel.from_config(config).eval()
    compress(folder, "embed", embed, tokenizer, sentence_transformers=True)
    wide = {"hidden_size": 4 * HEAD_DIM, "intermediate_size": 256, "num_hidden_layers": 3}
    make_served(
        folder,
        make_tiny_model("llama", initializer_range=0.1, tie_word_embeddings=True, **wide),
        tokenizer,
    )
    make_smollm2(folder)
    lines = [line for line in text.split(". ") if line.strip()][:32]
    rows = {
        "sft": [{"text": line} for line in lines],
        "dpo": [{"prompt": "say it: ", "chosen": a, "rejected": a[::-1]} for a in lines],
    }
    for name, made in rows.items():
        (folder / name).mkdir()
        body = "\n".join(json.dumps(row) for row in made)
        (folder / name / "train.jsonl").write_text(body + "\n")


def compress(
    folder: Path, name: str, model: Any, tokenizer: Any, *, sentence_transformers: bool = False
) -> None:
    from hf_evopress.jobs.pipeline import compress as run
    from hf_evopress.models.classes import call
    from hf_evopress.recipes.recipe import Recipe

    dense = folder / f"{name}-dense"
    model.to(torch.bfloat16).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    if sentence_transformers:
        module = "sentence_transformers.models"
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        said = [
            {"idx": i, "name": str(i), "path": path, "type": f"{module}.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ]
        (dense / "modules.json").write_text(json.dumps(said))
        (dense / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
        (dense / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
        (dense / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    recipe = Recipe.from_dict(
        {
            "model": str(dense),
            "out": str(folder / name),
            "budget": {"bits": 4.0},
            "levels": [f"gptq:bits={b},group_size=32" for b in (3, 4)],
            "data": {
                "sources": [str(folder / "text.txt")],
                **{"seq_len": 32, "calibration": 4, "search": 2, "heldout": 1, "test": 2},
            },
            "search": {"strategy": "knapsack", "sensitivity_tokens": 64},
        }
    )
    run(recipe)
    import transformers

    loaded = getattr(transformers, type(model).__name__).from_pretrained(folder / name)
    with torch.no_grad():
        found = call(loaded.eval(), torch.arange(1, 17)[None])[0, -1, :8]
    (folder / name / "expected.json").write_text(json.dumps(found.float().tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
