"""One checkpoint of many sizes: made, loaded at a size, resized while it runs, cut."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import hf_evopress
from hf_evopress import EvoPressConfig, Plan
from hf_evopress.jobs.stack import menu, resize_checkpoint, sizes_of, stack, units_in_files
from hf_evopress.loading.blocks import block_bytes
from hf_evopress.models.size import stored_bytes
from hf_evopress.plans.block_order import order_of
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.sharing.hub import push_folder
from hf_evopress.store.header import Entry, entries_of

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    return stack(recipe(home, "sizes"))[0]


def recipe(home: Path, out: str) -> Recipe:
    values = {
        "model": str(home / "dense"),
        "out": str(home / out),
        "work": str(home / f"{out}.work"),
        "budget": {"bits": 32.0},
        "levels": menu(4, 1),
        "ends": "rtn:bits=6,group_size=32",
        "data": {
            "sources": [str(home / "text.txt")],
            "seq_len": 64,
            "calibration": 24,
            "search": 8,
            "heldout": 0,
            "test": 0,
        },
        "search": {"sensitivity_tokens": 512},
    }
    return Recipe.from_dict(values)


class Killed(BaseException):
    """The process was killed here."""


def test_a_killed_run_goes_on_to_the_same_bytes(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(kind: str, done: int, total: int) -> None:
        if (kind, done) == ("levels", 9):
            raise Killed

    def kill_in(*args: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        stack(recipe(home, "killed"), progress=kill)
    units = sorted((home / "killed.work" / "store").glob("*.safetensors"))
    made = {path: path.stat().st_mtime_ns for path in units}
    assert made
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("hf_evopress.jobs.stack.arrange", kill_in)  # the model is written by then
        stack(recipe(home, "killed"))
    assert made == {path: path.stat().st_mtime_ns for path in made}
    again = stack(recipe(home, "killed"))[0]
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in again.iterdir()} == names
    for name in names - {"evopress_recipe.yaml", "README.md"}:  # which name the folders
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def load(folder: Path | str, **options: Any) -> Any:
    config = {"quantization_config": EvoPressConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def n_bytes(model: Any) -> int:
    tensors = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    return sum(tensors.values())


def middle(folder: Path) -> int:
    least, most = sizes_of(folder)
    return (2 * least + most) // 3


def test_the_file_holds_blocks_in_the_plans_order(folder: Path) -> None:
    plan = Plan.from_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = list(file.offset_keys())
    signs = [key.rpartition(".") for key in keys if key.endswith("_signs")]
    assert tuple(owner for owner, _, _ in signs) == order_of(plan)


def test_more_blocks_are_nearer_to_the_dense_model(home: Path, folder: Path) -> None:
    dense = logits(AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float32))
    least, most = sizes_of(folder)
    errors = [
        float((logits(load(folder, size=size)) - dense).norm())
        for size in (least, middle(folder), most)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_a_size_is_kept_and_used(folder: Path) -> None:
    size = middle(folder)
    model = load(folder, size=size)
    largest = max(t.nbytes for t in load(folder).state_dict().values())
    assert size - largest < n_bytes(model) <= size


def test_a_smaller_load_reads_no_other_block(folder: Path, tmp_path: Path) -> None:
    model = load(folder, size=middle(folder))
    wanted = set(model.state_dict())
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = list(file.offset_keys())
    unread = [key for key in keys if key.endswith("_signs") and key not in wanted]
    assert unread
    path = damaged / "model.safetensors"
    there = {e.name: e for e in entries_of(path)}
    with open(path, "r+b") as opened:
        for key in unread:
            opened.seek(there[key].start)
            opened.write(b"\xff" * there[key].n_bytes)
    assert torch.equal(logits(load(damaged, size=middle(folder))), logits(model))
    with pytest.raises(ValueError, match="damaged"):
        load(damaged)


def test_a_running_model_sheds_blocks_and_takes_them_back(folder: Path) -> None:
    model, whole = load(folder), load(folder)
    hf_evopress.resize(model, middle(folder))
    assert n_bytes(model) <= middle(folder)
    assert torch.equal(logits(model), logits(load(folder, size=middle(folder))))
    hf_evopress.resize(model, n_bytes(whole))
    assert torch.equal(logits(model), logits(whole))
    assert model.hf_quantizer.quantization_config.plan.levels == Plan.from_pretrained(folder).levels


def test_a_model_that_was_loaded_small_grows(folder: Path) -> None:
    model, whole = load(folder, size=middle(folder)), load(folder)
    hf_evopress.resize(model, n_bytes(whole))
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "pickle"],
)
def test_a_copy_is_resized_alone(folder: Path, copied: Callable[[Any], Any]) -> None:
    model, whole = load(folder, size=middle(folder)), load(folder)
    before, other = logits(model), copied(model)
    hf_evopress.resize(other, n_bytes(whole))
    assert torch.equal(logits(other), logits(whole))
    assert torch.equal(logits(model), before)
    assert (
        model.hf_quantizer.quantization_config.plan != other.hf_quantizer.quantization_config.plan
    )


def test_one_block_more_reads_the_bytes_of_that_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.from_pretrained(folder)
    model = load(folder, size=middle(folder))
    had, size = set(model.state_dict()), n_bytes(model)
    order = order_of(plan)
    n = len(order_of(model.hf_quantizer.quantization_config.plan))
    read: list[str] = []

    class Counting:
        """A safetensors file of which every way to tensors is counted, or not there."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, key: str) -> torch.Tensor:
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr("safetensors.safe_open", Counting)
    hf_evopress.resize(model, size + block_bytes(plan, order[n]))
    assert order_of(model.hf_quantizer.quantization_config.plan) == order[: n + 1]
    assert sorted(read) == sorted(set(model.state_dict()) - had)
    there = {e.name: e for e in entries_of(folder / "model.safetensors")}
    assert sum(there[key].n_bytes for key in read) == block_bytes(plan, order[n])
    assert {key.rpartition(".")[0] for key in read} == {order[n]}


def test_what_a_smaller_model_saves_is_a_model_of_its_size(folder: Path, tmp_path: Path) -> None:
    model = load(folder, size=middle(folder))
    model.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert torch.equal(logits(again), logits(model))
    again.resize(sizes_of(folder)[0])
    assert torch.equal(logits(again), logits(load(folder, size=sizes_of(folder)[0])))


def test_a_cut_checkpoint_is_the_model_loaded_at_that_size(folder: Path, tmp_path: Path) -> None:
    out = resize_checkpoint(str(folder), tmp_path / "cut", size=middle(folder))
    assert stored_bytes(out) <= middle(folder)
    model = load(out)
    assert torch.equal(logits(model), logits(load(folder, size=n_bytes(model))))
    assert len(order_of(Plan.from_pretrained(out))) < len(order_of(Plan.from_pretrained(folder)))
    smaller = resize_checkpoint(str(out), tmp_path / "again", size=sizes_of(folder)[0])
    assert stored_bytes(smaller) <= sizes_of(folder)[0]


def test_only_the_prefix_of_a_model_on_the_hub_is_downloaded(
    hub: Any, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, "me/sizes")
    out = resize_checkpoint("me/sizes", tmp_path / "cut", size=middle(folder))
    here = resize_checkpoint(str(folder), tmp_path / "here", size=middle(folder))
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (here / name).read_bytes()
    whole = entries_of(folder / "model.safetensors")
    header = min(e.start for e in whole)
    data = sum(e.n_bytes for e in entries_of(out / "model.safetensors"))
    assert hub.sent["model.safetensors"] == header + data


def test_a_model_on_the_hub_is_loaded_from_the_bytes_of_its_size(
    hub: Any, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, "me/sizes")
    size = middle(folder)
    cut = hf_evopress.download("me/sizes", size=size)
    model = load(cut)
    whole = entries_of(folder / "model.safetensors")
    data = sum(e.n_bytes for e in entries_of(cut / "model.safetensors"))
    assert hub.sent["model.safetensors"] == min(e.start for e in whole) + data
    assert torch.equal(logits(model), logits(load(folder, size=n_bytes(model))))
    hub.sent.clear()
    assert hf_evopress.download("me/sizes", size=size) == cut
    assert not hub.sent
    with pytest.raises(ValueError, match="is a folder of this machine"):
        hf_evopress.download(str(folder), size=size)
    # why there is download(): transformers asks for the files before it asks the quantizer
    assert n_bytes(load("me/sizes", size=size)) <= size
    assert hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_auto_classes_take_a_size_and_models_resize(hub: Any, folder: Path) -> None:
    size, auto = middle(folder), AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, size=size).eval()
    wanted = logits(load(folder, size=size))
    assert torch.equal(logits(model), wanted)
    assert model.resize(sizes_of(folder)[0]) is model and n_bytes(model) <= sizes_of(folder)[0]
    push_folder(folder, "me/sizes")
    own = EvoPressConfig(runtime="packed")
    there = auto.from_pretrained(
        "me/sizes", dtype=torch.float32, size=size, quantization_config=own, revision="main"
    )
    assert n_bytes(there) <= size and own.size is None
    assert hub.sent["model.safetensors"] < (folder / "model.safetensors").stat().st_size
    assert there.hf_quantizer.quantization_config.runtime == "packed"
    for wrong in ({"size": "much"}, {"size": "1MB", "quantization_config": {"bits": 4}}):
        with pytest.raises(ValueError, match="much|of models of many sizes"):
            auto.from_pretrained(folder, **wrong)
    with pytest.raises(ValueError, match="of no other size"):
        config = EvoPressConfig(size="2MB")
        auto.from_pretrained(folder, size="1MB", quantization_config=config)


def test_sizes_that_there_are_not_are_refused(folder: Path, tmp_path: Path) -> None:
    for call in (
        lambda: load(folder, size="1kB"),
        lambda: hf_evopress.resize(load(folder), "1kB"),
        lambda: resize_checkpoint(str(folder), tmp_path / "x", size="1kB"),
    ):
        with pytest.raises(ValueError, match="has no size of 1 kB: with one block per layer"):
            call()
    assert not (tmp_path / "x").exists()


def test_models_of_one_size_say_so(home: Path, write_model: Any, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float32)
    with pytest.raises(ValueError, match="this one is not packed"):
        hf_evopress.resize(dense, "1MB")
    with pytest.raises(ValueError, match="this one is dense"):
        load(home / "dense", plan=Plan({"a": "rtn:bits=4,group_size=32"}), size="1MB")
    with pytest.raises(ValueError, match="size='1MB' is of a model of many sizes.*dense"):
        AutoModelForCausalLM.from_pretrained(home / "dense", size="1MB")
    one = write_model(tmp_path, dense, "rtn:bits=4,group_size=32") / "small"
    for call in (lambda: load(one, size="1MB"), lambda: hf_evopress.resize(load(one), "1MB")):
        with pytest.raises(ValueError, match="hf-evopress stack"):
            call()


@pytest.mark.parametrize("blocks", [0, 17])
def test_a_number_of_blocks_that_no_stack_has_is_named(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 16 blocks, got {blocks}"):
        menu(blocks, 1)


@pytest.fixture(scope="module")
def llava(home: Path) -> Path:
    """A stack of LLaVA, whose files have other names than its modules."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
    text = {**sizes, "model_type": "llama", "vocab_size": 256, "intermediate_size": 64}
    vision = {**sizes, "model_type": "clip_vision_model", "intermediate_size": 64}
    vision |= {"image_size": 16, "patch_size": 8}
    settings = {"text_config": text, "vision_config": vision, "image_token_index": 255}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llava", **settings)
    here = home / "llava"
    shutil.copytree(home / "dense", here / "dense")
    AutoModelForImageTextToText.from_config(config).save_pretrained(here / "dense")
    shutil.copy(home / "text.txt", here)
    return stack(recipe(here, "sizes"))[0]


def test_a_model_whose_files_have_other_names_has_all_sizes(llava: Path, tmp_path: Path) -> None:
    def loaded(path: Path, **options: Any) -> Any:
        config = {"quantization_config": EvoPressConfig(**options)} if options else {}
        return AutoModelForImageTextToText.from_pretrained(path, **config).eval()

    names = [entry.name for entry in entries_of(llava / "model.safetensors")]
    assert not any(name.startswith("model.language_model.layers") for name in names)
    whole, size = loaded(llava), middle(llava)
    small = loaded(resize_checkpoint(str(llava), tmp_path / "cut", size=size))
    cut = loaded(llava, size=n_bytes(small))
    assert n_bytes(small) == n_bytes(cut) < n_bytes(whole)
    assert torch.equal(logits(small), logits(cut))
    assert not torch.equal(logits(small), logits(whole))
    hf_evopress.resize(cut, n_bytes(whole))
    assert torch.equal(logits(cut), logits(whole))
    hf_evopress.resize(whole, n_bytes(small))
    assert torch.equal(logits(small), logits(whole))


def test_experts_whose_files_have_other_names_are_known(tmp_path: Path) -> None:
    text = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 2, "vocab_size": 256}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    layer = "layers.0.mlp.experts.1.down_proj"
    unit, written = f"model.language_model.{layer}", f"language_model.model.{layer}"
    plan = Plan({unit: "bitstack:blocks=2"}, shapes={unit: (64, 64)})
    tensors = [Entry(f"{written}.block0_signs", "a", "U8", (64, 8), 0, 512)]
    assert units_in_files(tmp_path / "config.json", plan, tensors) == {written: unit}


def test_damage_is_seen_in_blocks_of_other_names(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    last = entries_of(file)[-1]  # a block that only the largest size has
    with open(file, "r+b") as opened:
        opened.seek(last.start)
        value = opened.read(1)[0]
        opened.seek(last.start)
        opened.write(bytes([value ^ 1]))
    size = middle(llava)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "bad", quantization_config=EvoPressConfig(size=size)
    )
    with pytest.raises(ValueError, match=rf"damaged: {last.name} differs from its checksum"):
        hf_evopress.resize(model, 10 * size)
    with pytest.raises(ValueError, match=f"1 tensors differ from their checksum.*{last.name}"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=f"1 tensors differ from their checksum.*{last.name}"):
        resize_checkpoint(str(tmp_path / "bad"), tmp_path / "cut", size=10 * size)
