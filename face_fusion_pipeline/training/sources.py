"""Where training photos come from: a folder, WebDataset shards or a Hugging Face dataset, all read as `Photo`s.

A source is cut into pieces that several processes can work on, and that need no second look once they are done.
"""

from __future__ import annotations

import glob
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..files.folders import Walk
from ..files.texts import UnreadableFileError, read_text
from .metadata import list_in, listed_photos
from .photos import (
    Box,
    BrokenShardError,
    DataError,
    Fault,
    ListedPiece,
    Photo,
    Piece,
    begins_as_picture,
    is_picture,
    shown,
)
from .records import Fields, as_caption, face_fields
from .shards import ShardPiece, braces, is_shard


__all__ = [
    "Box",
    "BrokenShardError",
    "DataError",
    "Fault",
    "ListedPiece",
    "Photo",
    "Piece",
    "ShardPiece",
    "SourceOptions",
    "open_source",
]

PIECE = 64  # photos
COMMON = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of the many suffixes of photos, for messages
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json", "*.parquet", "*.arrow")


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; columns, `config` and `streaming` are for Hugging Face datasets.

    `limit` is the largest number of photos read from a folder or dataset; shards are read whole, so it is refused.
    `exclude` are folders that do not belong to a folder of photos though they lie in it, such as that of the results.
    """

    image_column: str = "image"
    caption_column: str = "text"
    identity_column: str = "identity"
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    limit: int | None = None
    exclude: tuple[Path, ...] = ()


def open_source(source: str | Path, options: SourceOptions | None = None) -> Iterator[Piece]:
    """The pieces of a source.

    Args:
        source: a folder with `metadata.jsonl`, `.csv` or `.parquet` (ImageFolder), with one folder of photos for each
            person, with photos alone, with `.tar` shards or with a saved dataset; lists and shards may lie in folders
            below it. A pattern of shards such as `data/{0000..0012}.tar` or `data/*.tar`; else the Hub id of a
            dataset. Links are followed; hidden files and what a command of this package wrote are left out.

    Raises:
        DataError: nothing there, or metadata that cannot be read.
    """
    options = options or SourceOptions()
    folder = Path(source)
    if folder.is_dir():
        shards = sorted(path for path in folder.iterdir() if is_shard(path))
        if list_in(folder) is None and not shards and _is_dataset(folder):
            return _pieces(_dataset(folder, options), options.limit)
        if shards and options.limit is not None:
            raise _unlimited(shards[0], options.limit)
        return _pieces(_below(folder, options), options.limit)
    if any(f".{kind}" in str(source) for kind in ("tar", "tgz")):
        shards = [Path(name) for pattern in braces(str(source)) for name in sorted(glob.glob(pattern)) or [pattern]]
        if missing := [path for path in shards if not path.exists()]:
            raise DataError(f"there is no shard {missing[0]}: give a tar file, a pattern of some, or their folder")
        if options.limit is not None:
            raise _unlimited(shards[0], options.limit)
        return _pieces(shards, options.limit)
    if folder.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise DataError(f"{source} is no folder of photos, of .tar shards or of a dataset, and no Hub id (owner/name)")
    return _pieces(_dataset(str(source), options), options.limit)


def _unlimited(shard: Path, limit: int) -> DataError:
    return DataError(f"shards are read whole, not up to a limit of {limit} photos: name fewer of them, as {shard}")


def _pieces(found: Iterable[Photo | Path], limit: int | None) -> Iterator[Piece]:
    """Photos in pieces of a few; each shard, of which there is a path, is a piece of its own."""
    waiting: list[Photo] = []
    for one in islice(found, limit):
        if isinstance(one, Path):
            if limit is not None:
                raise _unlimited(one, limit)
            yield ShardPiece(one)
            continue
        waiting.append(one)
        if len(waiting) == PIECE:
            yield ListedPiece(tuple(waiting))
            waiting = []
    if waiting:
        yield ListedPiece(tuple(waiting))


# --- Folders -----------------------------------------------------------------------------------------------------


def _below(root: Path, options: SourceOptions) -> Iterator[Photo | Path]:
    """Photos and shards of a folder and of those below it, by name. Raises [`DataError`] if there is nothing."""
    walk, found = Walk(root, options.exclude), 0
    stack = [iter([root])]
    while stack:
        path = next(stack[-1], None)
        if path is None:
            stack.pop()
        elif path.is_dir() and (listing := list_in(path)) is None:
            try:
                stack.append(iter(walk.children(path)))
            except OSError as error:
                found += 1
                yield Photo(_inside(path, root), b"", refused=("unreadable folder", f"{path}: {error.strerror}"))
        else:
            for one in listed_photos(listing, root, options) if path.is_dir() and listing else _files(path, root):
                found += 1
                yield one
    if found:
        return
    if not any(path for kind in ("*.parquet", "*.arrow") for path in islice(root.rglob(kind), 1)):
        raise DataError(f"{root} has no photos ({', '.join(COMMON)}, ...), no metadata.jsonl and no .tar shards")
    yield from _dataset(root, options)


def _inside(path: Path, root: Path) -> str:
    return shown(str(path.relative_to(root)))


def _files(path: Path, root: Path) -> Iterator[Photo | Path]:
    """The shard or photo that a file is, if it is one; the folder of a photo is whose face it shows."""
    name, caption = _inside(path, root), path.with_suffix(".txt")
    if is_shard(path):
        yield path
    elif path.exists() and not path.is_file():
        if is_picture(path.name):
            yield Photo(name, b"", refused=("no file", f"{path} is a pipe, a device or a socket"))
    elif begins_as_picture(path):
        fields = Fields({})
        if caption.is_file() and caption != path:
            try:
                fields.record = {"caption": read_text(caption)}
            except UnreadableFileError as error:
                fields.faults.append(("caption", str(error)))
        text = fields.read("caption", as_caption, missing="")
        yield Photo(name, path, text=text, identity=_person(name), faults=tuple(fields.faults))


def _person(name: str) -> str | None:
    folder = str(Path(name).parent)
    return None if folder == "." else folder


# --- Datasets ----------------------------------------------------------------------------------------------------


def _is_dataset(folder: Path) -> bool:
    return any(found for pattern in DATASET_FILES for found in folder.glob(pattern))


def _dataset(source: Path | str, options: SourceOptions) -> Iterator[Photo]:
    """Photos of a Hugging Face dataset, encoded as they are stored: a broken one is found later, and skipped."""
    try:  # by name, as every optional package
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{source} is read with the package datasets: pip install 'face-fusion-pipeline[train]', or give a folder "
            "of photos or of .tar shards"
        ) from error
    try:
        if isinstance(source, Path) and not any(source.rglob("*.parquet")):
            dataset = datasets.load_from_disk(str(source))
            dataset = dataset[options.split] if isinstance(dataset, dict) else dataset
        else:
            dataset = datasets.load_dataset(
                str(source), options.config, split=options.split, streaming=options.streaming
            )
        columns = dataset.column_names or []
        if options.image_column not in columns:
            raise DataError(f"{source} has no column {options.image_column!r} but {columns}: name it, --image-column")
        dataset = dataset.cast_column(options.image_column, datasets.Image(decode=False))
        for number, row in enumerate(dataset):
            image = row[options.image_column] or {}
            content = image.get("bytes") or Path(image.get("path") or "no image")
            fields = Fields({**row, "identity": row.get(options.identity_column)})
            text = fields.read(options.caption_column, as_caption, missing="")
            found = face_fields(fields)
            yield Photo(f"row {number}", content, text=text, **found, faults=tuple(fields.faults))
    except DataError:
        raise
    except Exception as error:  # offline, gated, no such split, no picture: many types, one way out
        raise DataError(f"cannot read the dataset {source}: {error}") from error
