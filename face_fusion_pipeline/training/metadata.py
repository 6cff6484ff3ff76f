"""Folders with a list of their photos, as an ImageFolder has it: `metadata.jsonl`, `.csv` or `.parquet`."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.folders import inside
from ..files.texts import encoding_of, parse_json
from .photos import DataError, Photo, shown
from .records import Fields, as_caption, face_fields, is_missing


if TYPE_CHECKING:
    from .sources import SourceOptions

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LONGEST_LINE = 2**24  # characters


def list_in(folder: Path) -> Path | None:
    """The list of the photos in a folder, or None. A parquet file that names no files is a dataset, and no list."""
    for path in (folder / name for name in LISTS):
        if path.is_file() and (path.suffix != ".parquet" or "file_name" in _parquet(path).schema_arrow.names):
            return path
    return None


def listed_photos(path: Path, root: Path, options: SourceOptions) -> Iterator[Photo]:
    """The photos that the list at `path` names, which lie in its folder; they are called as seen from `root`.

    Raises [`DataError`] naming the line for one that names no file, and where the list cannot be read.
    """
    for number, record in _records(path):
        name = record.get("file_name")
        if is_missing(name):
            raise DataError(f"{path}, line {number}: 'file_name' is missing")
        if not isinstance(name, str):
            raise DataError(f"{path}, line {number}: file_name {name!r} is no text")
        yield _photo(name, record, path.parent, root, options)


def _photo(name: str, record: Mapping[str, Any], folder: Path, root: Path, options: SourceOptions) -> Photo:
    try:
        file = inside(folder, name)
    except ValueError as error:
        return Photo(shown(name), b"", refused=("outside the folder", f"file_name {error}"))
    if options.identity_column in record:
        record = {**record, "identity": record[options.identity_column]}
    fields = Fields(record)
    found = {
        "text": fields.read(options.caption_column, as_caption, missing=""),
        "reference": fields.read("reference_file_name", lambda value: inside(folder, value)),
        **face_fields(fields),
    }
    return Photo(shown(str(folder.relative_to(root) / name)), file, **found, faults=tuple(fields.faults))


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and record."""
    try:
        if path.suffix == ".parquet":
            batches = _parquet(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with open(path, "rb") as file:
            encoding = encoding_of(file.read(4))
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        with open(path, encoding=encoding, errors=errors, newline="" if path.suffix == ".csv" else None) as lines:
            yield from (_csv_records if path.suffix == ".csv" else _json_records)(path, lines)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _json_records(path: Path, lines: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    while line := lines.readline(LONGEST_LINE):
        number += 1
        if not line.strip():
            continue
        try:
            if len(line) == LONGEST_LINE:
                raise ValueError(f"it has more than {LONGEST_LINE:,} characters")
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: it is no JSON object")
        yield number, record


def _csv_records(path: Path, lines: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    head = lines.readline(LONGEST_LINE)
    separator = max(",;\t", key=head.count)
    lines.seek(0)
    reader = csv.DictReader(lines, delimiter=separator)
    try:
        for record in reader:
            yield reader.line_num, record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(path)  # by name, as every optional package
    except ImportError as error:
        raise DataError(f"{path} is read with the package pyarrow: pip install pyarrow") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
