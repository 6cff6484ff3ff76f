"""The command `face-fusion`. Every module of this package is a command: its file name with `-` for `_`.

A command module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`, and imports what is slow
(torch, diffusers) only inside `run`, so that `--help` answers at once.
"""

import argparse
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..face_errors import FaceFusionError
from ..files.atomic import check_writable


BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130

DESCRIPTION = "Face Fusion: new portraits of the same person from one photo and a prompt."
EPILOG = "face-fusion COMMAND --help explains a command. FACE_FUSION_DEBUG=1 shows the traceback of an error."


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"face-fusion: error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Shows a default where there is one and the help text does not name it already."""

    def __init__(self, prog: str, width: int | None = None) -> None:
        super().__init__(prog, max_help_position=30, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        known = action.default in (None, False, argparse.SUPPRESS) or "default" in text or not action.option_strings
        return text if known else f"{text} (default: %(default)s)".lstrip()


def commands() -> list[str]:
    """Names of all commands."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [name.replace("_", "-") for name in names]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="face-fusion", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name in commands():
        module: Any = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command = subparsers.add_parser(name, help=module.HELP, description=module.HELP, formatter_class=HelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 2 bad input (one line on stderr says what and the way out), 1 an unexpected error,
        130 interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="face-fusion: %(message)s")
    logging.getLogger("face_fusion_pipeline").setLevel(logging.INFO)
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help or a bad argument
        return int(stop.code or 0)
    try:
        if isinstance(getattr(args, "out", None), Path):
            check_writable(args.out)  # before hours of work
        return args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted; every file that was written is complete", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has left: `face-fusion ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except FaceFusionError as error:
        return _fail(str(error), BAD_INPUT)
    except OSError as error:
        return _fail(str(error), BAD_INPUT)
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {error}", UNEXPECTED)


def _fail(message: str, status: int) -> int:
    """One line on stderr, whatever the message's own line breaks."""
    if os.environ.get("FACE_FUSION_DEBUG") and sys.exc_info()[0] is not None:
        logging.getLogger(__name__).exception("traceback:")
    print(f"face-fusion: error: {' '.join(message.split())}", file=sys.stderr)
    return status
