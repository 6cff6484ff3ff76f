"""Text and JSON from outside: decoded by the mark at their start, of limited length, one line about what is wrong."""

from __future__ import annotations

import codecs
import json
import logging
from pathlib import Path
from typing import Any

from ..face_errors import FaceFusionError


logger = logging.getLogger(__name__)

MAX_BYTES = 2**26  # of a text file that is read as a whole
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class UnreadableFileError(FaceFusionError):
    """A text or JSON file that is not there, is damaged, or is none."""


def encoding_of(start: bytes) -> str:
    """The encoding of a text that begins with these bytes: by its byte order mark, else UTF-8."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def decode(content: bytes) -> str:
    """Encoded text as text. Raises ValueError for what is neither UTF-8 nor marked as UTF-16 or UTF-32."""
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise ValueError("not UTF-8 text (it has zero bytes)")
    return text


def read_text(path: Path, option: str = "") -> str:
    """The text of a file, its lines ended by line feeds; messages name it after the `option` that it was given by.

    Raises [`UnreadableFileError`] if it is no file, is above 64 MiB, or cannot be decoded.
    """
    name = f"{option} {path}".strip()
    try:
        if path.exists() and not path.is_file():
            raise UnreadableFileError(f"{name} is no file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UnreadableFileError(f"{name} has {size:,} bytes, above {MAX_BYTES:,}: that is no such text")
        return decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    except UnreadableFileError:
        raise
    except OSError as error:
        raise UnreadableFileError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UnreadableFileError(f"{name} is {error}: save it as UTF-8") from error


def parse_json(content: str | bytes) -> Any:
    """A JSON value; bytes that are not UTF-8 spoil only the text that has them, see [`is_garbled`].

    Raises ValueError for what is none, or is nested too deeply.
    """
    try:
        try:
            return json.loads(content)
        except UnicodeDecodeError:
            return json.loads(bytes(content).decode("utf-8", "surrogateescape"))  # type: ignore[arg-type]
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def is_garbled(text: str) -> bool:
    """Whether some of a text could not be decoded."""
    return any("\udc80" <= letter <= "\udcff" or letter == "\0" for letter in text)


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file. Raises [`UnreadableFileError`], which names the file and the `remedy`."""
    try:
        return parse_json(read_text(path))
    except UnreadableFileError as error:
        raise UnreadableFileError(f"{error}; {remedy}") from error
    except ValueError as error:
        raise UnreadableFileError(f"{path} is damaged ({error}): {remedy}") from error


def read_json_lines(path: Path, remedy: str) -> list[Any]:
    """The values of a file with a JSON value a line. Raises [`UnreadableFileError`], as [`read_json`] does."""
    values: list[Any] = []
    try:
        with open(path, encoding="utf-8") as lines:
            values.extend(parse_json(line) for line in lines if line.strip())
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    except ValueError as error:
        raise UnreadableFileError(f"{path} is damaged after line {len(values)} ({error}): {remedy}") from error
    return values


def read_log(path: Path) -> list[dict[str, Any]]:
    """The JSON objects, one a line, of a log to which lines are added; none where it is missing.

    A stop or a full disk may have cut a line off: what is no object is left out, and that is said.
    """
    found, damaged = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif line.strip():
            damaged.append(number)
    if damaged:
        logger.warning("%s: line %d is damaged and left out (%d in all)", path, damaged[0], len(damaged))
    return found
