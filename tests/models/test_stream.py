"""A model run block by block is the model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_evopress.models.stream import BlockStream

ARCHITECTURES = ("llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt")


def ids(batch=2, seq=12, seed=0):
    return torch.randint(1, 256, (batch, seq), generator=torch.Generator().manual_seed(seed))


def hiddens(stream, tokens):
    """Return the input of every block and, last, the output of the final one."""
    out = [stream.embed(tokens)]
    for i in range(stream.n_blocks):
        out.append(stream.run_block(i, out[-1]))
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_bit_identical_from_every_block(arch, attention, tiny_model):
    model = tiny_model(arch, attn_implementation=attention)
    stream = BlockStream(model)
    tokens = ids()
    expected = model(tokens).logits
    for i, hidden in enumerate(hiddens(stream, tokens)):
        assert torch.equal(stream.run_from(i, tokens, hidden), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_captured_arguments_serve_other_tokens_and_shapes(arch, tiny_model):
    model = tiny_model(arch)
    stream = BlockStream(model)
    for tokens in (ids(seed=1), ids(seed=2), ids(1, 20), ids(3, 1)):
        assert torch.equal(stream.head(tokens, hiddens(stream, tokens)[-1]), model(tokens).logits)


@torch.no_grad()
def test_a_block_runs_on_hidden_states_of_a_shape_never_embedded(tiny_model):
    model = tiny_model("gemma3_text")
    tokens = ids(1, 20)
    hidden = BlockStream(model).embed(tokens)
    fresh = BlockStream(model)
    for i in range(fresh.n_blocks):
        hidden = fresh.run_block(i, hidden)
    assert torch.equal(fresh.head(tokens, hidden), model(tokens).logits)


@torch.no_grad()
def test_blocks_that_return_tuples_are_streamed(tiny_model):
    model = tiny_model("llama")
    expected = model(ids()).logits
    for i, block in enumerate(model.model.layers):
        block.forward = _returning_tuple(block.forward)
        if i + 1 < len(model.model.layers):
            following = model.model.layers[i + 1]
            following.forward = _taking_tuple(following.forward)
    model.model.norm.forward = _taking_tuple(model.model.norm.forward)
    stream = BlockStream(model)
    assert torch.equal(model(ids()).logits, expected)
    for i, hidden in enumerate(hiddens(stream, ids())):
        assert torch.equal(stream.run_from(i, ids(), hidden), expected)


def _returning_tuple(forward):
    return lambda *args, **kwargs: (forward(*args, **kwargs), None)


def _taking_tuple(forward):
    return lambda x, *args, **kwargs: forward(x[0] if isinstance(x, tuple) else x, *args, **kwargs)


def test_gradients_flow_through_the_stream(tiny_model):
    model = tiny_model("llama").requires_grad_(False)
    stream = BlockStream(model)
    with torch.inference_mode():
        stream.embed(ids())  # what is captured here must not poison a later backward
    hidden = stream.embed(ids()).requires_grad_()
    out = stream.head(ids(), stream.run_block(1, stream.run_block(0, hidden)))
    (streamed,) = torch.autograd.grad(out.square().sum(), hidden)

    embedded = model.model.embed_tokens(ids()).requires_grad_()
    whole = model(inputs_embeds=embedded, use_cache=False).logits
    (direct,) = torch.autograd.grad(whole.square().sum(), embedded)
    assert torch.allclose(streamed, direct, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_the_head_in_chunks_equals_the_head(tiny_model):
    stream = BlockStream(tiny_model("llama"))
    tokens = ids(5)
    hidden = hiddens(stream, tokens)[-1]
    whole = stream.head(tokens, hidden)
    starts = []
    for part, logits in stream.head_chunks(tokens, hidden, batch_size=2):
        starts.append(part.start)
        assert torch.allclose(logits, whole[part], atol=1e-5)
    assert starts == [0, 2, 4]


@torch.no_grad()
def test_forwards_are_restored_after_an_error(tiny_model):
    model = tiny_model("llama")
    stream = BlockStream(model)
    stream.embed(ids())
    with pytest.raises(IndexError):
        stream.run_from(1, torch.full((2, 12), 999), torch.zeros(2, 12, 64))
    assert all("forward" not in block.__dict__ for block in model.model.layers)


@torch.no_grad()
def test_forwards_set_by_others_are_put_back(tiny_model):
    model = tiny_model("llama")
    own = model.model.layers[0].forward
    hooked = model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)
    stream = BlockStream(model)
    stream.check(ids())
    assert model.model.layers[0].forward is hooked


def test_blocks_that_need_the_tokens_are_refused(tiny_model):
    model = tiny_model("llama")
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, *args, **kw: [
        t + x[0, 0, 0] for t in rotary(x, *args, **kw)
    ]
    with pytest.raises(ValueError, match="depend on the tokens"):
        BlockStream(model).embed(ids())


def test_blocks_that_share_state_are_found_out(tiny_model):
    model = tiny_model("llama")
    second = model.model.layers[1].forward
    calls = []
    model.model.layers[1].forward = lambda x, *args, **kw: second(
        x + len(calls) + (calls.append(1) or 0), *args, **kw
    )
    with pytest.raises(ValueError, match="other logits"):
        BlockStream(model).check(ids())


def test_ids_of_the_wrong_kind_are_refused(tiny_model):
    stream = BlockStream(tiny_model("llama"))
    with pytest.raises(ValueError, match="LongTensor"):
        stream.embed(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        stream.run_from(3, ids(), torch.zeros(2, 12, 64))


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "hidden_size_per_layer_input"])
def test_models_whose_blocks_exchange_more_are_refused_by_what_they_exchange(key):
    settings = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, key: 2}
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, head_dim=16, vocab_size_per_layer_input=64,
        layer_types=["sliding_attention", "full_attention"] * 2, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=f"{key}=2 has .* cannot be computed block by block"):
        BlockStream(model).check(torch.arange(8)[None])


def test_blocks_that_keep_something_of_a_batch_are_found_by_a_second_one(tiny_model):
    model = tiny_model("llama")
    first, second = model.model.layers
    own, kept = second.forward, {}

    def keep(module, args, output):
        kept["mean"] = output.mean(1, keepdim=True)

    first.register_forward_hook(keep)
    second.forward = lambda hidden, *args, **kwargs: own(hidden + kept["mean"], *args, **kwargs)
    with pytest.raises(ValueError, match="block by block"):
        BlockStream(model).check(torch.arange(8)[None])
