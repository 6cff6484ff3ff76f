"""The command `face-fusion`. Every module of this package is a command: its file name with `-` for `_`.

A command module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`, and imports what is slow
(torch, diffusers) only inside `run`, so that `--help` answers at once.
"""

import argparse
import importlib
import io
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..face_errors import FaceFusionError
from ..files.atomic import check_writable
from ._arguments import Number, todays_words


BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130
LONGEST = 2000  # characters of a message: what it quotes may be of any length

DESCRIPTION = "Face Fusion: new portraits of the same person from one photo and a prompt."
EPILOG = "face-fusion COMMAND --help explains a command. FACE_FUSION_DEBUG=1 shows the traceback of an error."


class HelpFormatter(argparse.HelpFormatter):
    """Shows the range of a number, and a default unless it is empty or the help text already names it."""

    def __init__(self, prog: str, width: int | None = None) -> None:
        super().__init__(prog, max_help_position=30, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        notes = [action.type.range] if isinstance(action.type, Number) else []
        default = action.default
        known = default in (None, argparse.SUPPRESS, "", []) or default is False or "default" in text
        if not known and action.option_strings:
            notes.append(
                f"default: {' '.join(map(str, default))}" if isinstance(default, list) else "default: %(default)s"
            )
        if not notes:
            return text
        return f"{text[:-1]}, {', '.join(notes)})" if text.endswith(")") else f"{text} ({', '.join(notes)})"


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad argument in one line, also of the commands below it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        words = one_line(re.sub(r"^argument (\S+): must be", r"\1 must be", message))
        self.exit(BAD_INPUT, f"face-fusion: error: {words} (see {self.prog} --help)\n")


def commands() -> list[str]:
    """Names of all commands."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [name.replace("_", "-") for name in names]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="face-fusion", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands():
        module: Any = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 2 bad input (one line on stderr says what and the way out), 1 an unexpected error,
        130 interrupted.
    """
    with own_lines():
        try:
            args = build_parser().parse_args(todays_words(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:  # --help or a bad argument
            return int(stop.code or 0)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
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


@contextmanager
def own_lines() -> Iterator[None]:
    """Results on stdout, our own log on stderr; a letter that a terminal lacks is escaped, and ends nothing."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it cannot fetch we say ourselves, once
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("face-fusion: %(message)s"))
    package = logging.getLogger("face_fusion_pipeline")
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


def one_line(message: str) -> str:
    """The message without line breaks, of a length that can be read."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def _fail(message: str, status: int) -> int:
    """One line on stderr, whatever the message's own line breaks."""
    if os.environ.get("FACE_FUSION_DEBUG") and sys.exc_info()[0] is not None:
        logging.getLogger(__name__).exception("traceback:")
    print(f"face-fusion: error: {one_line(message)}", file=sys.stderr)
    return status
