"""Vision-language models, calibrated on conversations with images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from hf_evopress.cli import main
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.models.classes import call
from hf_evopress.models.images import give_images
from hf_evopress.models.two_stacks import stream_of
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.store.level_store import LevelStore

IMAGE = 256  # the token at places of images
SIDE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
TEXT = {
    **SIDE, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "model_type": "llama", "vocab_size": 257,
}  # fmt: skip
VISION = {
    **SIDE, "intermediate_size": 64, "image_size": 16, "patch_size": 8,
    "model_type": "clip_vision_model",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def home(
    byte_tokenizer: PreTrainedTokenizerFast,
    structured_text: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with dense/, a tiny LLaVA with its processor, chats.jsonl and images/."""
    here = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llava", text_config=TEXT, vision_config=VISION, image_token_index=IMAGE
    )
    model: Any = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(here / "dense")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_saved(byte_tokenizer, here / "words"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(here / "dense")  # fmt: skip
    write_chats(here, structured_text(120))
    return here


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(here: Path, text: str) -> None:
    (here / "images").mkdir()
    lines = []
    for i in range(24):
        Image.new("RGB", (20, 16 + i), (10 * i, 255 - 10 * i, 99)).save(here / f"images/{i}.png")
        asked = [{"type": "image", "path": f"images/{i}.png"}, {"type": "text", "text": "What?"}]
        said = text[20 * i : 20 * i + 24 + i]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": turns}))
    (here / "chats.jsonl").write_text("\n".join(lines) + "\n")


def recipe(here: Path, **more: Any) -> Recipe:
    counts = {"calibration": 4, "search": 2, "heldout": 1, "test": 3}
    return Recipe.from_dict(
        {
            "model": str(here / "dense"),
            "out": str(here / "out"),
            "budget": {"bits": 4.0},
            "levels": [f"gptq:bits={b},group_size=32" for b in (3, 4)],
            "data": {"sources": [str(here / "chats.jsonl")], "seq_len": 64, **counts},
            "search": {"settings": {"generations": 1}, "sensitivity_tokens": 128},
            **more,
        }
    )


def test_a_model_is_compressed_on_conversations_with_images(home: Path) -> None:
    result = compress(recipe(home))  # raises if the reloaded logits differ in one bit
    searched = next(row for row in result.rows if row.name == "searched").report
    assert searched.kl_nats is not None and 0 < searched.kl_nats < 0.5
    assert not any("vision_tower" in unit for unit in result.plan)
    assert (result.folder / "processor_config.json").is_file()
    card = (result.folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(result.folder)
    processor = transformers.AutoProcessor.from_pretrained(result.folder)
    turn = {"role": "user", "content": [{"type": "image", "path": str(home / "images/3.png")}]}
    asked = processor.apply_chat_template(
        [turn], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (asked["input_ids"] == IMAGE).sum() == 4
    assert loaded.generate(**asked, max_new_tokens=4, do_sample=False).shape[1] > 4


def test_the_vision_tower_is_compressed_where_asked(home: Path) -> None:
    more = {"out": str(home / "seeing"), "levels": [f"gptq:bits={b},group_size=32" for b in (2, 4)]}
    result = compress(recipe(home, vision=True, **more))  # raises if the logits differ in a bit
    tower = [unit for unit in result.plan if "vision_tower" in unit]
    assert len(tower) == 2 * 6 and any("language_model" in unit for unit in result.plan)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(result.folder)
    assert {name for name in compressed_linears(loaded) if "vision" in name} == set(tower)
    # LLaVA reads the states before the tower's last block: nothing depends on that block's levels
    scores = LevelStore(home / "seeing.work" / "store").scores
    for unit in tower:
        felt = scores(unit, "gptq:bits=2,group_size=32")["sensitivity_nats"]
        assert felt == 0 if ".layers.1." in unit else felt > 0
    with pytest.raises(ValueError, match="--vision needs images to calibrate on"):
        text = {"sources": [str(home / "dense" / "chat_template.jinja")], "seq_len": 64}
        Job(recipe(home, vision=True, data=text))


def test_sequences_hold_whole_images_and_no_padding(home: Path) -> None:
    job = Job(recipe(home, out=str(home / "other")))
    assert job.media is not None
    rows = torch.cat(list(job.tokens.values()))
    assert rows.shape == (10, 64) and len({tuple(row) for row in rows.tolist()}) == 10
    for row in rows:
        n_places = int((row == IMAGE).sum())
        pixels = job.media.images.of(row[None])["pixel_values"]
        assert n_places == 4 * len(pixels) and n_places > 0
        assert (row == 0).sum() == 0
    again = Job(recipe(home, out=str(home / "other")))  # tokens and images are kept
    assert all(torch.equal(again.tokens[name], part) for name, part in job.tokens.items())
    shutil.rmtree(home / "other.work" / "images")
    with pytest.raises(ValueError, match="lacks the images of tokens.*delete the folder tokens/"):
        Job(recipe(home, out=str(home / "other"))).tokens  # noqa: B018


def test_images_change_the_logits_and_blocks_see_them(home: Path) -> None:
    job = Job(recipe(home, out=str(home / "third")))
    model, ids = job.model, job.tokens["search"]
    stream = stream_of(model)
    stream.check(ids)
    with torch.no_grad(), stream.whole():
        whole = call(model, ids)
        n = int((ids[0] == IMAGE).nonzero()[0])
        give_images(model, None)
        blind = call(model, ids)
    assert torch.equal(whole[0, :n], blind[0, :n])
    assert not torch.equal(whole[0, n:], blind[0, n:])


def test_what_is_wrong_with_images_is_said_at_once(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out*"))
    lines = (tmp_path / "chats.jsonl").read_text().splitlines()

    def fails(message: str, error: type[Exception] = ValueError, **more: Any) -> None:
        with pytest.raises(error, match=message):
            Job(recipe(tmp_path, **more))

    fails("fitness perplexity is of text", search={"fitness": "perplexity"})
    fails("refinement learns from text", refine="fast")
    (tmp_path / "images" / "2.png").unlink()
    fails(r"line 3 of .*chats.jsonl names the image 'images/2.png'", FileNotFoundError)
    changed = [*lines[:1], lines[1].replace('"path"', '"url"')]
    (tmp_path / "chats.jsonl").write_text("\n".join(changed))
    fails("line 2 of .* gives an image by its url")
    (tmp_path / "chats.jsonl").write_text("\n".join(lines[3:6]))
    with pytest.raises(ValueError, match=r"conversations for \d sequences of 64 .* 10 are needed"):
        Job(recipe(tmp_path)).tokens  # noqa: B018
    (tmp_path / "dense" / "processor_config.json").unlink()
    fails("has no processor")


def test_the_command_line_takes_images(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(home / "dense"), "--bits", "5", "--out", str(home / "by-words")]
    words += ["--data", str(home / "chats.jsonl"), "--seq-len", "64", "--calibration", "4"]
    words += ["--search-pool", "2", "--level", "rtn:bits=4,group_size=32", "--generations", "1"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    assert "searched" in capsys.readouterr().out
