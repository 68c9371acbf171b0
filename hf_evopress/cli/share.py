"""push, pull, plans, card, report, import, export-config: commands that share what was made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import bars, console, table
from .options import Overwrite

if TYPE_CHECKING:
    from ..plans.plan import Plan
    from ..plans.published import Kind, Published
    from ..plans.repo import Entry

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
KindOption = Annotated[str | None, typer.Option(help="bits, sparsity or drop; default: as found.")]
Sparsity = Annotated[float | None, typer.Option(help="Base sparsity that levels count from.")]
Step = Annotated[int | None, typer.Option(help="Weights per sparsity level. Default: 1000000.")]


def push(
    folder: Annotated[str, typer.Argument(help="A model, an adapter, a plan or plans.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="Where in the repository, such as eora for an adapter.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
) -> None:
    """Push a model with plan, recipe and card, an adapter, or plans, in one commit.

    \b
    hf-evopress push smol-3.3bit me/smol-3.3bit
    """
    from ..sharing.cards import CARD, is_ours, write_card
    from ..sharing.hub import plans_in, push_folder

    if not plans_in(Path(folder)) and is_ours(Path(folder) / CARD):
        write_card(folder, name=repo)
    info = push_folder(
        folder,
        repo,
        private=private or None,
        revision=revision,
        subfolder=subfolder,
        commit_message=message,
        create_pr=pull_request,
    )
    console.print(
        f"{info.pr_url or info.commit_url}\ncommit {info.oid}", markup=False, soft_wrap=True
    )


def pull(
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    folder: Annotated[str, typer.Argument(help="Folder to write, whole or not at all.")],
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a repository into a folder, checked; an interrupted download goes on.

    \b
    hf-evopress pull me/smol-3.3bit smol-3.3bit --revision v1
    """
    from ..sharing.hub import pull as download

    with bars() as progress:
        path = download(repo, folder, revision=revision, overwrite=overwrite, progress=progress)
    console.print(f"{repo} is in {path}", markup=False, soft_wrap=True)


def plans(
    base_model: Annotated[str, typer.Argument(help="The dense model, owner/name on the Hub.")],
    limit: Annotated[int, typer.Option(help="At most so many repositories.")] = 20,
) -> None:
    """List the plans on the Hub for a base model.

    \b
    hf-evopress plans HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from ..plans.repo import Entry, find_repos, list_plans

    rows = []
    for repo in find_repos(base_model, limit=limit):
        try:
            entries = list(list_plans(repo).values()) or [_plan_of_model(repo)]
        except (OSError, ValueError) as error:  # one bad repository does not hide the others
            entries = [Entry("", asked=f"not readable: {error}")]
        for e in entries:
            numbers = [_number(e.bits_per_weight, "{:.3f}"), _number(e.kl_nats, "{:.4f}")]
            rows.append((repo, e.file, *numbers, e.asked or ""))
    if not rows:
        console.print(f"no plans for {base_model} on the Hub yet", markup=False, soft_wrap=True)
        return
    headers = ("repository", "file", "bits/weight", "KL (nats)", "asked for")
    console.print(table(headers, rows, is_text=True))


def _plan_of_model(repo: str) -> Entry:
    """Return what the plan of a model repository, which has no index, says of itself."""
    from ..plans.plan import Plan
    from ..plans.repo import entry_of, read_plan

    text, where = read_plan(repo)
    return entry_of(where.rpartition("/")[2], Plan.from_json(text).to_dict())


def card(
    folder: Annotated[str, typer.Argument(help="A compressed model or an adapter.")],
    name: Annotated[
        str | None, typer.Option(help="The repository it will have. Default: the folder's name.")
    ] = None,
) -> None:
    """Write the card of a model or adapter anew: README.md and its pictures.

    \b
    hf-evopress card smol-3.3bit --name me/smol-3.3bit
    """
    from ..sharing.cards import write_card

    console.print(f"card written to {write_card(folder, name=name)}", markup=False, soft_wrap=True)


def report(
    source: Annotated[str, typer.Argument(help="A model folder, a plan, or a Hub repository.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. Default: NAME.report.html.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page about a compressed model: figures, heat map, every layer.

    \b
    hf-evopress report smol-3.3bit
    """
    from ..sharing.html_report import write_report

    path = write_report(source, out, overwrite=overwrite)
    console.print(f"report written to {path}", markup=False, soft_wrap=True)


def import_config(
    source: Annotated[str, typer.Argument(help="An EvoPress configuration, or a folder of them.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Plan file, or folder for a folder.")],
    model: Annotated[
        str | None, typer.Option(help="The model, to check against; sparsity needs it.")
    ] = None,
    revision: Revision = None,
    level: Annotated[
        str | None,
        typer.Option(
            "--level", "-l", help="What a number becomes: 'rtn:bits={bits},group_size=64'."
        ),
    ] = None,
    kind: KindOption = None,
    sparsity: Sparsity = None,
    step: Step = None,
    overwrite: Overwrite = False,
) -> None:
    """Read configurations in EvoPress's own text formats into plans.

    \b
    hf-evopress import Llama-3.1-8B_3bit.txt --model meta-llama/Llama-3.1-8B --out plan.json
    """
    from ..base.target import check_file
    from ..models.skeleton import fit_to
    from ..plans.plan import MARK
    from ..plans.published import STEP, config_files, read_published, to_plan

    files = config_files(source)
    several = Path(source).is_dir()
    made: list[tuple[Path, Published, Plan]] = []
    for file in files:
        config = read_published(file, kind=_kind(kind))
        shapes, names = fit_to(config, model, revision=revision) if model else (None, None)
        plan = to_plan(
            config,
            shapes=shapes,
            level=level,
            sparsity=sparsity,
            step=step or STEP,
            sub_block=names,
            base_model=model,
            revision=revision,
        )
        path = Path(out)
        if several:  # a folder in a folder becomes part of the name: plans lie side by side
            inside = file.relative_to(source).with_suffix(".json")
            path = path / inside.as_posix().replace("/", "-")
        check_file(path, MARK, overwrite=overwrite)
        made.append((path, config, plan))
    if several:
        Path(out).mkdir(parents=True, exist_ok=True)
    for path, config, plan in made:
        checked = "" if model else "; not checked: give --model"
        console.print(
            f"{config.name} ({config.kind}) -> {plan.save(path)}{checked}",
            markup=False,
            soft_wrap=True,
        )


def export_config(
    plan: Annotated[str, typer.Argument(help="A plan: a file, a folder or a Hub repository.")],
    out: Annotated[Path, typer.Argument(help="Text file to write.")],
    kind: KindOption = None,
    sparsity: Sparsity = None,
    step: Step = None,
    blocks: Annotated[int | None, typer.Option(help="Decoder blocks, for a drop plan.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a plan in EvoPress's own text format.

    \b
    hf-evopress export-config plan.json Llama-3.1-8B_3bit.txt
    """
    from ..base.resources import atomic_write
    from ..base.target import check_file
    from ..plans.plan import Plan
    from ..plans.published import published_text

    check_file(out, None, overwrite=overwrite)
    text = published_text(
        Plan.from_pretrained(plan), kind=_kind(kind), sparsity=sparsity, step=step, n_blocks=blocks
    )
    console.print(
        f"configuration written to {atomic_write(out, text)}", markup=False, soft_wrap=True
    )


def _kind(word: str | None) -> Kind | None:
    from ..base.plugins import did_you_mean
    from ..plans.published import KINDS

    for kind in KINDS:
        if word == kind:
            return kind
    if word is not None:
        raise ValueError(f"unknown kind {word!r}{did_you_mean(word, list(KINDS))}")
    return None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


COMMANDS = {
    "push": push,
    "pull": pull,
    "plans": plans,
    "card": card,
    "report": report,
    "import": import_config,
    "export-config": export_config,
}
