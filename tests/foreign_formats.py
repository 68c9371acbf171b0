"""Checkpoints in the formats of other quantizers, written by hand, without their libraries.

Every function returns the folder (or file) that it wrote. Codes are rounded to nearest, in groups
of 32 inputs where the format has groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_evopress.models.units import find_units

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GGUF_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gptq(folder: Path, model: Any, tokenizer: Any) -> Path:
    """GPTQ's format, version 1: int32 words along the inputs, zero points one too low."""

    def tensors(W: Tensor) -> dict[str, Tensor]:
        codes, scale = _symmetric(W, 4)
        zeros = torch.full(scale.shape, 7, dtype=torch.int32)
        return {
            "qweight": _words((codes + 8).T, 0),
            "qzeros": _words(zeros.T, 1),
            "scales": scale.T.contiguous(),
            "g_idx": torch.arange(W.shape[1], dtype=torch.int32) // GROUP,
        }

    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    return _write(folder, model, tokenizer, tensors, {**config, "sym": True})


def awq(folder: Path, model: Any, tokenizer: Any) -> Path:
    """AWQ's gemm format: int32 words along the outputs, nibbles interleaved."""

    def tensors(W: Tensor) -> dict[str, Tensor]:
        codes, scale, zero = _asymmetric(W, 4)
        return {
            "qweight": _words(codes.T, 1, _AWQ_ORDER),
            "qzeros": _words(zero.T, 1, _AWQ_ORDER),
            "scales": scale.T.contiguous(),
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    return _write(folder, model, tokenizer, tensors, {**config, "version": "gemm"})


def compressed_int4(folder: Path, model: Any, tokenizer: Any) -> Path:
    """compressed-tensors' pack-quantized format, W4A16: int32 words along the inputs."""

    def tensors(W: Tensor) -> dict[str, Tensor]:
        codes, scale = _symmetric(W, 4)
        return {
            "weight_packed": _words(codes + 8, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor(W.shape),
        }

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    return _compressed(folder, model, tokenizer, tensors, "pack-quantized", weights)


def compressed_int8(folder: Path, model: Any, tokenizer: Any) -> Path:
    """compressed-tensors' int-quantized format, W8A8: activations are rounded as well.

    To 5 bits a channel here, so that there is an error to repair.
    """

    def tensors(W: Tensor) -> dict[str, Tensor]:
        codes, scale = _symmetric(W, 5, W.shape[1])
        return {"weight": codes.to(torch.int8), "weight_scale": scale}

    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return _compressed(folder, model, tokenizer, tensors, "int-quantized", weights, inputs)


def compressed_fp8(folder: Path, model: Any, tokenizer: Any) -> Path:
    """compressed-tensors' float-quantized format: FP8 weights, one scale per channel."""

    def tensors(W: Tensor) -> dict[str, Tensor]:
        scale = W.abs().amax(1, keepdim=True) / 448
        return {"weight": (W / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    return _compressed(folder, model, tokenizer, tensors, "float-quantized", weights)


def finegrained_fp8(folder: Path, model: Any, tokenizer: Any) -> Path:
    """DeepSeek's format: FP8 weights in blocks of 32 x 32."""

    def tensors(W: Tensor) -> dict[str, Tensor]:
        blocks = W.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
        scale = blocks.abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
        return {"weight": (W / spread).to(torch.float8_e4m3fn), "weight_scale_inv": scale}

    config = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}
    return _write(folder, model, tokenizer, tensors, {**config, "activation_scheme": "dynamic"})


def gguf(path: Path, model: Any, tokenizer: Any) -> Path:
    """A GGUF file of Q4_0 weights, with the tokenizer of `tokenizer` beside it; needs `gguf`."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path.parent)
    c = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    units = {unit.name for unit in find_units(model)}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        W = _llama_cpp_order(module, tensor, c).float().numpy()
        if module in units:
            kind = GGMLQuantizationType.Q4_0
            writer.add_tensor(_gguf_name(module), quantize(W, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(module), np.ascontiguousarray(W))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(module: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if module in top:
        return f"{top[module]}.weight"
    block, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{_GGUF_BLOCK[part]}.weight"


def _llama_cpp_order(module: str, W: Tensor, config: Any) -> Tensor:
    """Return rows of queries and keys as llama.cpp keeps them: pairs of a rotation side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n = heads.get(module.rpartition(".")[2])
    if n is None:
        return W
    return W.unflatten(0, (n, 2, -1)).transpose(1, 2).reshape(W.shape).contiguous()


def _compressed(
    folder: Path,
    model: Any,
    tokenizer: Any,
    tensors: Callable[[Tensor], dict[str, Tensor]],
    form: str,
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
) -> Path:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, **weights},
        "input_activations": inputs and {"symmetric": True, **inputs},
        "format": form,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return _write(folder, model, tokenizer, tensors, config)


def _write(
    folder: Path,
    model: Any,
    tokenizer: Any,
    tensors: Callable[[Tensor], dict[str, Tensor]],
    config: Mapping[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for unit in find_units(model):
        W = state.pop(f"{unit.name}.weight")
        made = tensors(W)
        state.update({f"{unit.name}.{part}": t.contiguous() for part, t in made.items()})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    known = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    known["quantization_config"] = dict(config)
    (folder / "config.json").write_text(json.dumps(known), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def _symmetric(W: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Return codes (out, in) in [-2^(bits-1), 2^(bits-1)) and scales (out, groups)."""
    top = 2 ** (bits - 1) - 1
    grouped = W.unflatten(1, (-1, group))
    scale = grouped.abs().amax(2) / top
    codes = (grouped / scale[..., None]).round().clamp(-top - 1, top)
    return codes.flatten(1).int(), scale


def _asymmetric(W: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (out, in), scales and zero points (out, groups): W = scale (codes - zero)."""
    top = 2**bits - 1
    grouped = W.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = (high - low) / top
    zero = (-low / scale).round()
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.flatten(1).int(), scale, zero.int()


def _words(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Return 4-bit codes eight to an int32 along `dim`, code order[i] at bits 4 i."""
    eight = codes.int().movedim(dim, -1).unflatten(-1, (-1, 8))
    words = torch.zeros(eight.shape[:-1], dtype=torch.int32)
    for i, which in enumerate(order):
        words |= eight[..., which] << (4 * i)
    return words.movedim(-1, dim)
