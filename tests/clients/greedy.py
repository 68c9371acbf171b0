"""Greedy continuations by transformers and by vLLM, for the clients that compare them.

Each in a process of its own: vLLM 0.32 fails where numba has been imported before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

PROMPTS = ("the red fox sees the", "1 and 1 is", "once upon a time there was an old engine")
N_TOKENS = 24

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model can be looked at
sys.path.remove(str(Path(__file__).resolve().parent))  # its files have the names of packages


def prompts(folder: Path) -> list[list[int]]:
    """Return the prompts in tokens of the model in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def by_transformers(folder: Path, dtype: str) -> list[list[int]]:
    """Return the most likely tokens after each prompt, as transformers computes them."""
    command = [sys.executable, __file__, str(folder), dtype]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def generate(folder: Path, dtype: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # all tokens, also those after an end
    found = []
    for ids in prompts(folder):
        options = {"max_new_tokens": N_TOKENS, "do_sample": False, "pad_token_id": 0}
        out = model.generate(torch.tensor([ids]), **options)
        found.append(out[0, len(ids) :].tolist())
    return found


def largest_gap(folder: Path, wanted: list[list[int]], found: list[list[int]]) -> float:
    """Return how far the first other token of `found` lies below the most likely one, at most.

    In float32, as a share of the logits' standard deviation; 0 where all tokens are the same.
    Sums of bfloat16 in another order decide ties otherwise, and a text goes on from there.
    """
    command = [sys.executable, __file__, str(folder), json.dumps([wanted, found])]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def gap(folder: Path, wanted: list[list[int]], found: list[list[int]]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    gaps = [0.0]
    for ids, a, b in zip(prompts(folder), wanted, found, strict=True):
        if a != b:
            same = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            with torch.no_grad():
                logits = model(torch.tensor([ids + a[:same]])).logits[0, -1]
            gaps.append(float((logits.max() - logits[b[same]]) / logits.std()))
    return max(gaps)


def start_vllm(folder: Path, dtype: str, **options: object):
    """Return vLLM with the model in `folder`."""
    from vllm import LLM

    return LLM(str(folder), dtype=dtype, max_model_len=256, **{"enforce_eager": True, **options})


def by_vllm(llm, folder: Path) -> list[list[int]]:
    """Return the most likely tokens after each prompt, as vLLM computes them."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=N_TOKENS, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in prompts(folder)]
    return [list(reply.outputs[0].token_ids) for reply in llm.generate(asked, wanted)]


if __name__ == "__main__":
    folder, said = Path(sys.argv[1]), sys.argv[2]
    print(json.dumps(gap(folder, *json.loads(said)) if said[0] == "[" else generate(folder, said)))
