"""Options shared by commands, and the recipe made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ..recipes.recipe import KINDS, Recipe

Model = Annotated[str, typer.Argument(help="A dense model: a Hub name or a folder.")]
Bits = Annotated[
    str | None,
    typer.Option(
        help="Budget: stored bits per compressed weight, scales and zero points counted; "
        "in search also LOW:HIGH, for plans of all sizes between."
    ),
]
Size = Annotated[str | None, typer.Option(help="Budget: the whole checkpoint, such as 90MB.")]
Ratio = Annotated[float | None, typer.Option(help="Budget: share of the dense checkpoint's size.")]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Budget: share of the weights (or of values, with low rank) removed."),
]
DropRatio = Annotated[
    float | None,
    typer.Option(help="Budget: share of attention and of MLP sub-blocks dropped, rest dense."),
]
DropKinds = Annotated[
    list[str] | None,
    typer.Option(help="Let the search drop these sub-blocks: attention, mlp or both. Repeat."),
]
MaxDrop = Annotated[
    float | None, typer.Option(help="Drop at most this share of each kind of sub-block.")
]
KeepFirst = Annotated[int, typer.Option(help="First blocks of which nothing is dropped.")]
KeepLast = Annotated[int, typer.Option(help="Last blocks of which nothing is dropped.")]
Families = Annotated[
    list[str] | None,
    typer.Option(
        "--family",
        "-f",
        help="Offer the levels of quant (scalar codes), trellis (a third of the loss at the same "
        "bytes, slower to make and, on CPUs, at half their speed), sparse, lowrank, residual "
        "(quant and low-rank repair) or all. Repeat. Default: quant, or sparse under --sparsity.",
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder to write.")]
Window = Annotated[
    int | None,
    typer.Option(
        help="Tokens per window of the figures; windows do not overlap. Default: 2048, or the "
        "model's context where that is shorter."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace all that is in OUT, also what others put there."),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        help="Text to calibrate and search on: a file (.txt, .json, "
        ".jsonl, .csv, .tsv, .parquet), a Hub dataset name[:config], or self: what the model "
        "writes itself (self:chat under its template, self:raw without, self:FILE in answer to the "
        "prompts of a file, one a line). Repeat for more. "
        'For Whisper .jsonl of {"audio": FILE, "text": ...}. '
        "Default: HuggingFaceFW/fineweb-edu.",
    ),
]
Test = Annotated[
    str | None,
    typer.Option(
        help="Text file or table for the final figures; default: unseen parts of the data."
    ),
]
Column = Annotated[
    str,
    typer.Option(
        help="Column of text or conversations in tables and datasets. Default: text, else "
        "messages, conversations or instruction, input and output."
    ),
]
Work = Annotated[
    str | None,
    typer.Option(
        help="Folder for statistics, levels and search state, reused by later runs of "
        "the same model, data and levels at any budget. Default: OUT.work."
    ),
]
Levels = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        "-l",
        help="Offer this level, such as gptq:bits=3,group_size=64; "
        "repeat for a menu. Default: the menu of --family.",
    ),
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Leave units like this dense: '*.layers.0.*'. Repeat.")
]
Tie = Annotated[
    list[str] | None,
    typer.Option(help="Units of a block that share a level: q_proj,k_proj,v_proj. Repeat."),
]
Pin = Annotated[
    list[str] | None, typer.Option(help="PATTERN=LEVEL: fix a unit's level: '*.v_proj=...'.")
]
Forbid = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=LEVELS, two patterns: '*.0.*=gptq:bits=2*'. Repeat."),
]
Strategy = Annotated[
    str,
    typer.Option(
        help="evolve (ours), evopress (as published), knapsack, uniform, random, brute_force, "
        "layer_error; of sparsity owl, pq_index; of drops swap, block_influence, window, "
        "drop_perplexity."
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(help="Another strategy to measure beside and to start from. Repeat."),
]
StartPlans = Annotated[
    list[str] | None,
    typer.Option(
        "--start",
        help="A plan to begin with as well: a file, a folder or a Hub name, such as one of an "
        "earlier or another's search. Repeat.",
    ),
]
FitnessWords = Annotated[
    str,
    typer.Option(
        "--fitness",
        help="What the search minimises: a name, or a sum such as 'kl*0.7 + perplexity*0.3'; "
        "see hf-evopress list.",
    ),
]
SearchDtype = Annotated[
    str,
    typer.Option(
        help="What plans are compared in: float32, bfloat16, or auto: bfloat16 where the model "
        "ships in it and the device multiplies in it. Final figures are those of float32 on a CPU."
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="Show the generations in tensorboard, trackio, wandb, ... Repeat."),
]
Generations = Annotated[int | None, typer.Option(help="Generations of the search.")]
RefineMode = Annotated[
    str,
    typer.Option(
        "--refine",
        help="Finish the plan, at no extra byte: fast makes its levels anew along the compressed "
        "layers, best tunes them by gradients as well; end-to-end trains scales and norms of the "
        "whole model on what the dense one says; best+end-to-end is the closest, and slower than "
        "all the rest.",
    ),
]
RefineLevels = Annotated[
    list[str] | None,
    typer.Option(
        "--refine-level",
        help="Tune levels like this before the search, so that it compares what will ship: "
        "'gptq:bits=[23],*'. Each takes the time of --refine best. Repeat.",
    ),
]
For = Annotated[
    str,
    typer.Option(
        "--for",
        help="What the model is for, which is what levels it is offered: cpu, gpu, vllm, exl3 "
        "(exllamav3), transformers or gguf (tensor types and bytes of GGUF files; one is written "
        "to OUT-gguf as well). Default: what this machine is.",
        show_default=False,
    ),
]
Vision = Annotated[
    bool,
    typer.Option(
        "--vision", help="Compress the vision tower, too; --data has conversations with images."
    ),
]
EndsWords = Annotated[
    str,
    typer.Option(
        "--ends",
        help="Embedding and output head: auto (searched with --size and --ratio, 8 bits with "
        "--bits), budget (searched, and --bits counts their weights), dense, or a level.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens of one sequence whose key-value cache --size includes: how each layer's is "
        "stored is searched beside the levels of its weights."
    ),
]
Share = Annotated[
    bool,
    typer.Option(
        "--share",
        help="Let layers of neighbouring blocks share their codes, each with a low-rank difference "
        "of its own; two layers of a pair take one level. Never the better on SmolLM2.",
    ),
]
Widths = Annotated[
    list[float] | None,
    typer.Option(
        "--width",
        help="Try this share of the MLPs' channels under --size: of each share a narrower model is "
        "made, refitted and searched, and the closest to the whole one is kept. Repeat: "
        "--width 1 --width 0.875. Pays at 2 bits per weight and below.",
    ),
]
CacheLevels = Annotated[
    list[str] | None,
    typer.Option(
        "--cache",
        help="Offer this setting of the cache under --context: dense, kv:bits=4,group_size=64, or "
        "GEAR, kv:bits=2,rank=4,outliers=0.02. Repeat. Default: dense, 8, 4, 3 and 2 bits.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of data order and search.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration and search sequence.")]
Calibration = Annotated[int, typer.Option(help="Calibration sequences.")]
Written = Annotated[
    int,
    typer.Option(
        help="Sequences that the dense model writes itself, for refinement to learn from as well; "
        "they help where the text is short."
    ),
]
SearchPool = Annotated[int, typer.Option(help="Search sequences to draw from.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code that the model brings: read it first."),
]


def bits_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--bits is a number, or LOW:HIGH in search; got {text!r}") from None


# of a recipe, said as they are
_TAKEN = (
    "model",
    "out",
    "work",
    "revision",
    "trust_remote_code",
    "ends",
    "cache",
    "share",
    "widths",
    "vision",
    "skip",
    "refine",
    "refine_levels",
    "export",
)


def recipe_of(**words: Any) -> Recipe:
    """Return the recipe that options of a command say."""
    given = {k: v for k, v in words.items() if v is not None}
    if "width" in given:
        given["widths"] = given.pop("width")
    if "bits" in given:
        given["bits"] = bits_of(given["bits"])
    search: dict[str, Any] = {
        k: given[k] for k in ("strategy", "fitness", "seed", "compare", "start") if k in given
    }
    search["dtype"] = given.get("search_dtype", "auto")
    if "generations" in given:
        search["settings"] = {"generations": given["generations"]}
    if "low" in given:
        search["settings"] = {"low": given["low"]}
    data = {
        "sources": given.get("data", []),
        "seq_len": given["seq_len"],
        "calibration": given["calibration"],
        "search": given.get("search_pool", 32),
        "written": given.get("written", 0),
        "column": given.get("column", "text"),
        "seed": given["seed"],
    }
    recipe: dict[str, Any] = {
        **{k: given[k] for k in _TAKEN if k in given},
        "budget": {
            "drop" if k == "drop_ratio" else k: given[k]
            for k in ("bits", "size", "ratio", "sparsity", "drop_ratio", "context")
            if k in given
        },
        "data": data,
        "search": search,
        "tie": [group.split(",") for group in given.get("tie", ())],
        "pin": _pairs("--pin PATTERN=LEVEL", given.get("pin", ())),
        "forbid": _pairs("--forbid PATTERN=LEVELS", given.get("forbid", ())),
        "families": given.get("family", ()),
        "drop": _drop(given),
    }
    if "level" in given:
        recipe["levels"] = given["level"]
    return Recipe.from_dict(recipe)


def _drop(given: Mapping[str, Any]) -> dict[str, Any]:
    kinds = [k for kind in given.get("drop", ()) for k in (KINDS if kind == "both" else [kind])]
    rules: dict[str, Any] = {k: given.get(k, 0) for k in ("keep_first", "keep_last")}
    if "max_drop" in given:
        rules["max"] = given["max_drop"]
    if not kinds and "drop_ratio" not in given and any(rules.values()):
        raise ValueError("--max-drop, --keep-first and --keep-last need --drop or --drop-ratio")
    return {"kinds": kinds, **rules}


def _pairs(what: str, items: Sequence[str]) -> dict[str, str]:
    """Return pattern -> value of options that say PATTERN=VALUE."""
    pairs = {}
    for item in items:
        pattern, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"write {what}, got {item!r}")
        pairs[pattern] = value
    return pairs
