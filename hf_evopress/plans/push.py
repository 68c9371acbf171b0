"""Push plans to a repository on the Hub: one or several, with index and card, in one commit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any, Protocol

from .card_template import hub_base, level_counts, measured_on, protocol, render, results_rows
from .hub_errors import clear_errors, patiently
from .level import Level
from .repo import (
    FILE_NAME,
    INDEX_NAME,
    TAG,
    Entry,
    check_name,
    entry_of,
    index_text,
    list_plans,
    plan_rows,
    read_plan,
)

logger = logging.getLogger(__name__)

_WITHOUT_DATA = frozenset({"dense", "drop", "zero", "rtn", "hadamard", "magnitude", "folded"})


class PlanLike(Protocol):
    """What is pushed: `hf_evopress.Plan`, which is made of this module."""

    def to_json(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


def push_plans(
    plans: Mapping[str, PlanLike],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Any:
    """Return huggingface_hub's CommitInfo after pushing `plans` (file name -> plan).

    All plans, the index and the card are one commit. Plans that the repository already has stay
    in its index. The card is written unless the repository is a model's.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not plans:
        raise ValueError("there is no plan to push")
    files = {check_name(name): plan.to_json() for name, plan in plans.items()}
    for name, plan in plans.items():
        _warn_unpinned(name, plan.to_dict())
    api = HfApi(token=token)
    with clear_errors(repo_id, revision):
        repo_id = open_repo(api, repo_id, private=private, revision=revision)
        head = patiently(lambda: api.model_info(repo_id, revision=revision))
        there = {sibling.rfilename for sibling in head.siblings or ()}
        known = list_plans(repo_id, revision=head.sha, token=token) if INDEX_NAME in there else {}
        told = {name: plan.to_dict() for name, plan in plans.items()}
        if FILE_NAME in there and FILE_NAME not in told:  # the card is about the main plan
            told = {FILE_NAME: _there(repo_id, head.sha, token), **told}
        index = {**known, **{name: entry_of(name, plan) for name, plan in told.items()}}
        if "config.json" not in there:
            files["README.md"] = plan_card(repo_id, told, index)
        files[INDEX_NAME] = index_text(list(index.values()))
        return patiently(
            lambda: api.create_commit(
                repo_id,
                [CommitOperationAdd(name, text.encode()) for name, text in files.items()],
                commit_message=commit_message or f"Upload {', '.join(sorted(plans))[:60]}",
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,  # two who push at once do not lose each other's entries
            )
        )


def open_repo(api: Any, repo_id: str, *, private: bool | None, revision: str | None) -> str:
    """Return the full name of a repository, made with its branch `revision` if not there."""
    full: str = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision is not None and not revision.startswith("refs/"):
        patiently(lambda: api.create_branch(full, branch=revision, exist_ok=True))
    return full


def plan_card(repo_id: str, plans: Mapping[str, dict[str, Any]], index: Mapping[str, Entry]) -> str:
    """Return the card of a plan repository: what the plans say of themselves, and how to use it.

    plans: file name -> `Plan.to_dict()`; the card is about evopress_plan.json, else the first.
    """
    main = plans.get(FILE_NAME, next(iter(plans.values())))
    base, levels = hub_base(main.get("base_model")), main["levels"]
    rows = plan_rows(main)
    headers, cells = results_rows(rows)
    bases = {name for entry in index.values() if (name := hub_base(entry.base_model))}
    metadata = {
        "library_name": "hf-evopress",
        "base_model": sorted(bases) if len(bases) > 1 else base,
        "base_model_relation": "quantized" if bases else None,
        "tags": ["evopress", TAG],
    }
    return render(
        "plan.md",
        metadata,
        repo_id=repo_id,
        base_model=base,
        revision=main.get("revision"),
        asked=(main.get("budget") or {}).get("asked"),
        entries=sorted(index.values(), key=lambda e: (e.bits_per_weight or 1e9, e.file)),
        file=None if FILE_NAME in index or len(index) == 1 else next(iter(plans)),
        counts=level_counts(levels, main.get("shapes") or {}),
        needs_data=any(needs_data(level) for level in levels.values()),
        headers=headers,
        rows=cells,
        protocol=protocol(rows),
        text=measured_on(main),
        against=[],
        search={k: v for k, v in (main.get("search") or {}).items() if _is_plain(v)},
    )


def needs_data(level: str) -> bool:
    """Return whether text is asked for to make a level, by the names of its methods.

    Rather once too often: what is not needed is not read.
    """
    return any(term.method not in _WITHOUT_DATA for term in Level.parse(level).terms)


def _there(repo_id: str, revision: str | None, token: str | None) -> dict[str, Any]:
    """Return the repository's main plan with shapes as numbers, as `Plan.to_dict()` has them."""
    text, where = read_plan(repo_id, revision=revision, filename=FILE_NAME, token=token)
    try:
        plan = json.loads(text)
        shapes = {u: [int(n) for n in s.split("x")] for u, s in plan.get("shapes", {}).items()}
        return {**plan, "levels": dict(plan["levels"]), "shapes": shapes}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{where} is not a plan; repair or delete it first: {error}") from error


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _warn_unpinned(name: str, plan: Mapping[str, Any]) -> None:
    revision = plan.get("revision")
    if hub_base(plan.get("base_model")) and not re.fullmatch(r"[0-9a-f]{40}", str(revision)):
        logger.warning(
            "%s does not pin its base model to a commit (revision %s); "
            "plan.replace(revision='<40 digits>') makes it reproducible",
            name,
            revision,
        )
