"""The command line, `hf-evopress`: thin wrappers that turn words into calls and results into print.

Nothing here imports torch before a command needs it: `--help`, `show` and `list` answer at once.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from . import apply, bench, compress, evaluate, export, inspect, refine, share, stack, tune
from .console import error_console

HELP = """Give it a model and a size: it finds what each layer can bear, and writes an ordinary
Hugging Face model, with a plan to share.

\b
The whole line:   hf-evopress compress HuggingFaceTB/SmolLM2-135M-Instruct --bits 3.3 --out smol

\b
Then in Python:   import hf_evopress; model = AutoModelForCausalLM.from_pretrained("smol")

Every long command can be stopped with Ctrl-C and goes on where it was when it is run again.
"""

STOPPED = 130  # the exit status of what Ctrl-C stopped
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


# typer carries its own copy of click, whose base of usage errors it does not export
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from ..base.version import __version__

        print(f"hf-evopress {__version__}")
        raise typer.Exit()


@app.callback()
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what goes on.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", force=True)
    if not debug:
        for noisy in ("urllib3", "filelock", "httpx", "matplotlib"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


for module in (compress, apply, refine, tune, stack, export, inspect, evaluate, bench, share):
    for name, command in module.COMMANDS.items():
        app.command(name)(command)


def main(arguments: list[str] | None = None, *, name: str = "hf-evopress") -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.

    name: what the usage lines call it.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(words, prog_name=name, standalone_mode=False)
        if code == STOPPED:  # typer turns Ctrl-C into it
            _stopped()
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_stopped())
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    except (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError) as error:
        if "--debug" in words:
            raise
        error_console.print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2 if isinstance(error, (ValueError, TypeError, LookupError)) else 1)
    sys.exit(code or 0)


def _stopped() -> int:
    error_console.print(
        "stopped; what was finished is kept, and the same command goes on from there"
    )
    return STOPPED
