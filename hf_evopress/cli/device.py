"""--device and --offload, which every command that computes has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Device = Annotated[
    str,
    typer.Option(help="What to compute on: cpu, cuda, cuda:1, mps, xpu, ...; auto: the first GPU."),
]
Offload = Annotated[
    str,
    typer.Option(
        help="none: all of the model is on the device; cpu: its blocks come one at a time, for "
        "models larger than the card; disk: hidden states wait in files of the work folder, too, "
        "for models larger than memory; auto: none or cpu, by the device's free memory."
    ),
]


def computes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that has --device and --offload as well, and computes there."""

    @functools.wraps(command)
    def run(*args: Any, device: str = "auto", offload: str = "auto", **kwargs: Any) -> Any:
        from ..base.devices import using

        with using(device, offload=offload):
            return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)  # as typer reads it
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("device", keyword, default="auto", annotation=Device),
        inspect.Parameter("offload", keyword, default="auto", annotation=Offload),
    ]
    parameters = [*signature.parameters.values(), *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "device": Device, "offload": Offload}
    return run
