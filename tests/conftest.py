"""Tiny models, text and a tokenizer that tests share; all made in memory, all deterministic."""

from __future__ import annotations

import copy
import os
import random
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# Triton decides when it is imported, which transformers may do, whether kernels run on a GPU or in
# Python (test_triton.py).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton") is not None:
        from .triton_interpreter import be_quick

        be_quick()

import pytest
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_evopress.loading.kernels.cpu import compiled
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

from .hub_server import Hub

# Facts such as "it loads as it was saved" are facts about bits, so tests load models with the
# reference; test_kernels.py and test_runtimes.py say how near to it the default is.
os.environ.setdefault("HF_EVOPRESS_RUNTIME", "packed")

# A CPU that multiplies bfloat16 tunes in it. Tiny models, whose loss is small to begin with, lose
# as much by that as they gain by tuning. So tests compute in float32 on any machine.
_capabilities = torch.cpu.get_capabilities()
torch.cpu.get_capabilities = lambda: {**_capabilities, "avx512_bf16": False}

# Which test is the first to compile kernels, and warns of it, differs from run to run.
compiled._PATIENCE = float(threading.TIMEOUT_MAX)

ARCHITECTURES = ("llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt")

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 128}
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 16},
    "gemma3_text": _GROUPED
    | {
        "head_dim": 16,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": _GROUPED,
    "gpt_neox": {"intermediate_size": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_inner": 128},
    "falcon": {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mixtral": _GROUPED | {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": _GROUPED
    | {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "gpt_oss": _GROUPED
    | {
        "head_dim": 16,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def make_tiny_model(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a random model of 2-3 layers, hidden size 64, 256 tokens, float32, in eval mode."""
    settings = _SIZES | _SPECIAL[arch] | overrides
    torch.manual_seed(seed)
    config = AutoConfig.for_model(arch, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_structured_text(n_sentences: int = 400, *, seed: int = 0) -> str:
    """Return ASCII text with grammar and repetition, so that a tiny model can learn from it."""
    rng = random.Random(seed)
    adjectives = ["red", "tall", "quiet", "old", "brave", "round"]
    nouns = ["fox", "tower", "river", "engine", "doctor", "planet", "garden"]
    verbs = ["sees", "follows", "builds", "forgets", "paints"]
    sentences = []
    for i in range(n_sentences):
        noun, digit = rng.choice(nouns), rng.randrange(10)
        sentences.append(
            f"the {rng.choice(adjectives)} {noun} {rng.choice(verbs)} the {rng.choice(nouns)}. "
            f"{digit} and {digit} is {2 * digit}; the {noun} knows."
        )
        if i % 4 == 3:
            sentences.append("\n\n")
    return " ".join(sentences).replace(" \n\n ", "\n\n")


def make_tokens(n_sequences: int, seq_len: int, *, seed: int = 1) -> Tensor:
    """Return (n_sequences, seq_len) tokens, the bytes of structured text."""
    text = make_structured_text(n_sequences * seq_len // 30 + 8, seed=seed)
    data = torch.tensor(list(text.encode()), dtype=torch.long)
    return data[: n_sequences * seq_len].view(n_sequences, seq_len)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: the last files of two processes then end together."""
    slow = {i.path for i in items if i.get_closest_marker("slow") or i.get_closest_marker("model")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """The factory tiny_model(arch="llama", *, seed=0, **config_overrides)."""
    return make_tiny_model


@pytest.fixture(scope="session")
def structured_text() -> Callable[..., str]:
    """The factory structured_text(n_sentences=400, *, seed=0)."""
    return make_structured_text


@pytest.fixture(scope="session")
def text_tokens() -> Callable[..., Tensor]:
    """The factory text_tokens(n_sequences, seq_len, *, seed=1): byte tokens of such text."""
    return make_tokens


@pytest.fixture(params=["cpu", "sim", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, the second device of tests/second_device.py, and a GPU where there is one."""
    if request.param == "sim":
        from . import second_device  # noqa: F401  registers it
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def trained_llama() -> nn.Module:
    """A 3-layer Llama that has learnt the structured text; copy.deepcopy it before changing it."""
    model = make_tiny_model("llama", num_hidden_layers=3).train()
    data = torch.tensor(list(make_structured_text(2000).encode()), dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    steps = 120
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(data) - 65, (12,), generator=generator)
        batch = torch.stack([data[s : s + 64] for s in starts.tolist()])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def write_model(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., Path]:
    """write_model(folder, model, levels=None, tokens=None) -> folder, which then holds dense/.

    With levels (one for all units, or several that go round), small/ as well: the model compressed
    by them, on tokens where they need some. Both with a tokenizer; the plan names `me/dense`.
    """

    def written(folder: Path, model: nn.Module, *levels: str, tokens: Tensor | None = None) -> Path:
        dense: Any = copy.deepcopy(model)
        dense.save_pretrained(folder / "dense")
        byte_tokenizer.save_pretrained(folder / "dense")
        if levels:
            units = find_units(dense)
            plan = Plan(
                {u.name: levels[i % len(levels)] for i, u in enumerate(units)},
                shapes={u.name: u.shape for u in units},
                base_model="me/dense",
            )
            compress_model(dense, plan, tokens)
            attach(dense, plan)
            dense.save_pretrained(folder / "small")
            byte_tokenizer.save_pretrained(folder / "small")
        return folder

    return written


@pytest.fixture(scope="module")
def home(
    trained_llama: nn.Module,
    write_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder of the test file's own: a model in dense/ with its tokenizer, and text.txt."""
    dense = copy.deepcopy(trained_llama).to(torch.bfloat16)  # others share the original
    folder = write_model(tmp_path_factory.mktemp("home"), dense)
    (folder / "text.txt").write_text(make_structured_text(900, seed=5))
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte; token 0 is <eos>, nothing is added to a text."""
    return byte_level_tokenizer()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte; token 0 is <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    by_byte = _byte_characters()
    vocab = {by_byte[b] if b else "<eos>": b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _byte_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte in byte-level BPE (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in table):
        table[b] = chr(256 + n)
    return table


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub on the loopback interface that huggingface_hub talks to, with an empty cache."""
    from huggingface_hub import constants

    with Hub() as server:
        home = tmp_path_factory.mktemp("hf_home")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(
            "huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(home / "assets")
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # transformers keeps one client, with the endpoint of its first use
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # retries without the waiting
        # for other processes, which read these before they import the client
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HOME": str(home)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for key, value in {**environment, **switches}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
