"""``python -m triton_norm`` and the console script ``triton-norm``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import triton_norm

from .cli import check, demo, info, tune
from .cli.streams import piped


class Parser(argparse.ArgumentParser):
    """Errors are one line: the usage is a ``--help`` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> Parser:
    parser = Parser(prog="triton-norm", description="Fused normalization layers for PyTorch, in Triton.")
    parser.add_argument("--version", action="version", version=f"triton-norm {triton_norm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, check, tune, info):
        summary = module.SUMMARY
        command = commands.add_parser(
            module.NAME,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {module.DETAILS}",
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    with piped():
        arguments = build_parser().parse_args(argv)
        try:
            return arguments.run(arguments)
        except info.UserError as error:
            arguments.command.error(str(error))
            raise  # not reached: that exits
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
