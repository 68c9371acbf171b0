"""`optimum-cli evopress ...`: the command line of hf-evopress under optimum's.

optimum imports this file at every start of its command line, so it imports nothing of ours
until the command runs. No folder under `optimum` may hold an __init__.py (PEP 420).
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class EvoPressCommand(BaseOptimumCLICommand):
    """Hands all words behind `optimum-cli evopress` to `hf-evopress`, options and --help too."""

    COMMAND = CommandInfo(
        name="evopress", help="Compress a model to a size, layer by layer (hf-evopress)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        # no word begins with this: options are left for hf-evopress, which knows them
        parser.prefix_chars = "\0"
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        """Run the command and exit with its code."""
        from hf_evopress.cli import main

        main(list(self.args.words) or ["--help"], name="optimum-cli evopress")


REGISTER_COMMANDS = [EvoPressCommand]
