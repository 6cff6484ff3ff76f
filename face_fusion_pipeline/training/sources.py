"""Where training photos come from: a folder, WebDataset shards or a Hugging Face dataset, all read as `Photo`s.

A source is cut into pieces that several processes can work on, and that need no second look once they are done.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..face_errors import FaceFusionError


PIECE = 64  # photos
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json", "*.parquet", "*.arrow")
Box = tuple[float, float, float, float]


class DataError(FaceFusionError):
    """Training data that cannot be used as a whole; the message says what and the way out."""


class BrokenShardError(FaceFusionError):
    """A tar file that cannot be read to its end."""


@dataclass(frozen=True)
class Photo:
    """A photo as it was found, not yet decoded.

    Attributes:
        name: what reports call it.
        content: path, or the encoded file.
        text: caption; empty if there is none.
        identity: whose face it is, or None.
        people: number of people if the source knows it.
        box: the face, XYXY pixels, if the source knows it.
        landmarks5: five points of the face, see `face_detectors.Face`, if the source knows them.
        reference: photo that shows the face to be taken as reference, if the source names one.
        as_reference: whether it may serve as reference of the person's other photos; a drawing, say, may not.
    """

    name: str
    content: Path | bytes
    text: str = ""
    identity: str | None = None
    people: int | None = None
    box: Box | None = None
    landmarks5: list[list[float]] | None = None
    reference: Path | None = None
    as_reference: bool = True


class Piece(Protocol):
    """Photos that are read together; `key` is another one when they have changed."""

    @property
    def key(self) -> str: ...

    def photos(self) -> Iterator[Photo]: ...


@dataclass(frozen=True)
class ListedPiece:
    """Photos that are known by name."""

    listed: tuple[Photo, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256("\n".join(map(_describe, self.listed)).encode()).hexdigest()[:16]

    def photos(self) -> Iterator[Photo]:
        return iter(self.listed)


def _describe(photo: Photo) -> str:
    """All that an example is made of; for a file its size and time of change stand for what is in it."""
    if isinstance(photo.content, bytes):
        content = hashlib.sha256(photo.content).hexdigest()
    else:
        state = photo.content.stat() if photo.content.exists() else None
        content = f"{photo.content} {state and (state.st_size, state.st_mtime_ns)}"
    return repr((content, *(str(getattr(photo, f.name)) for f in fields(photo) if f.name != "content")))


@dataclass(frozen=True)
class ShardPiece:
    """A WebDataset shard: members that share a name up to the first dot are one sample."""

    path: Path

    @property
    def key(self) -> str:
        return f"{self.path.name} {self.path.stat().st_size if self.path.exists() else 'missing'}"

    def photos(self) -> Iterator[Photo]:
        """Raises [`BrokenShardError`] where the file cannot be read on; what came before is good."""
        sample: dict[str, bytes] = {}
        current = ""
        try:
            with tarfile.open(self.path, "r|*") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    if file is None:
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if (key := f"{folder}/{stem}".lstrip("/")) != current:
                        yield from _shard_photo(f"{self.path.name}/{current}", sample)
                        sample, current = {}, key
                    sample[f".{suffix.lower()}"] = file.read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            yield from _shard_photo(f"{self.path.name}/{current}", sample)
            raise BrokenShardError(f"{self.path} cannot be read on after {current or 'its start'}: {error}") from error
        yield from _shard_photo(f"{self.path.name}/{current}", sample)


def _shard_photo(name: str, sample: dict[str, bytes]) -> Iterator[Photo]:
    images = [content for suffix, content in sample.items() if suffix in IMAGE_SUFFIXES]
    if not images:
        return
    try:
        record = json.loads(sample.get(".json", b"{}"))
        text = sample[".txt"].decode() if ".txt" in sample else record.get("text") or record.get("caption") or ""
        yield Photo(name, images[0], text=str(text).strip(), **_face_fields(record))
    except (ValueError, AttributeError, TypeError):  # its json or txt is none; without them it still is a photo
        yield Photo(name, images[0])


def _face_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Who and where from a record: `identity`, `box`, `landmarks5`, or the lists `identities`, `boxes`, ... of all.

    Raises ValueError where a box or point is none.
    """
    people = [len(record[name]) for name in ("identities", "boxes") if isinstance(record.get(name), list)]
    identity, box, points = record.get("identity"), record.get("box"), record.get("landmarks5")
    if people and people[0] == 1:
        identity = record["identities"][0] if identity is None and "identities" in record else identity
        box = record["boxes"][0] if box is None and "boxes" in record else box
        points = points[0] if points is not None and len(points) == 1 else points
    if box is not None:
        box = tuple(float(value) for value in box)
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"box {list(box)} is not [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    if points is not None and [len(point) for point in points] != [2] * 5:
        points = None
    return {
        "identity": None if identity is None else str(identity),
        "people": people[0] if people else None,
        "box": box,
        "landmarks5": points,
        "as_reference": bool(record.get("as_reference", True)),
    }


# --- Kinds of sources --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; columns, `config` and `streaming` are for Hugging Face datasets.

    `limit` is the largest number of photos read from a folder or dataset; shards are read whole, so it is refused.
    """

    image_column: str = "image"
    caption_column: str = "text"
    identity_column: str = "identity"
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    limit: int | None = None


def open_source(source: str | Path, options: SourceOptions | None = None) -> Iterator[Piece]:
    """The pieces of a source.

    Args:
        source: a folder with `metadata.jsonl` (ImageFolder), with one folder of photos for each person, with photos
            alone, with `.tar` shards or with a saved dataset; a pattern of shards such as `data/{0000..0012}.tar` or
            `data/*.tar`; else the Hub id of a dataset.

    Raises:
        DataError: nothing there, or metadata that cannot be read.
    """
    options = options or SourceOptions()
    folder = Path(source)
    if folder.is_dir():
        if (folder / "metadata.jsonl").is_file():
            return _listed(islice(_image_folder(folder, options), options.limit))
        if shards := sorted(folder.glob("*.tar")):
            return _shards(shards, options)
        if any(found for pattern in DATASET_FILES for found in folder.glob(pattern)):
            return _listed(islice(_dataset(folder, options), options.limit))
        return _listed(islice(_folder_per_person(folder), options.limit))
    if ".tar" in str(source):
        paths = [Path(name) for pattern in _braces(str(source)) for name in sorted(glob.glob(pattern)) or [pattern]]
        if missing := [path for path in paths if not path.is_file()]:
            raise DataError(f"there is no shard {missing[0]}: give a tar file, a pattern of some, or their folder")
        return _shards(paths, options)
    if folder.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise DataError(f"{source} is no folder of photos, of .tar shards or of a dataset, and no Hub id (owner/name)")
    return _listed(islice(_dataset(str(source), options), options.limit))


def _shards(paths: list[Path], options: SourceOptions) -> Iterator[Piece]:
    if options.limit is not None:
        raise DataError(
            f"shards are read whole, not up to a limit of {options.limit} photos: name fewer of them, as {paths[0]}"
        )
    return (ShardPiece(path) for path in paths)


def _listed(photos: Iterable[Photo]) -> Iterator[Piece]:
    photos = iter(photos)
    while piece := tuple(islice(photos, PIECE)):
        yield ListedPiece(piece)


def _braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` -> a08.tar, a09.tar, a10.tar, as WebDataset writes a range of shards."""
    head, brace, rest = pattern.partition("{")
    span, close, tail = rest.partition("}")
    first, dots, last = span.partition("..")
    if not (brace and close and dots and first.isdigit() and last.isdigit()):
        return [pattern]
    return [
        f"{head}{number:0{len(first)}d}{end}" for number in range(int(first), int(last) + 1) for end in _braces(tail)
    ]


def _image_folder(folder: Path, options: SourceOptions) -> Iterator[Photo]:
    with open(folder / "metadata.jsonl", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                name, reference = record["file_name"], record.get("reference_file_name")
                text = record.get(options.caption_column) or ""
                if options.identity_column in record:
                    record["identity"] = record[options.identity_column]
                yield Photo(
                    name,
                    folder / name,
                    text=str(text),
                    reference=folder / reference if reference else None,
                    **_face_fields(record),
                )
            except KeyError as error:
                raise DataError(f"{folder / 'metadata.jsonl'}, line {number}: {error} is missing") from error
            except (ValueError, TypeError) as error:
                raise DataError(f"{folder / 'metadata.jsonl'}, line {number}: {error}") from error


def _folder_per_person(folder: Path) -> Iterator[Photo]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} has no photos ({', '.join(IMAGE_SUFFIXES)}), no metadata.jsonl and no .tar shards")
    for path in paths:
        caption = path.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else ""
        inside = path.relative_to(folder)
        identity = str(inside.parent) if len(inside.parts) > 1 else None
        yield Photo(str(inside), path, text=text, identity=identity)


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
        if isinstance(source, Path) and not any(source.glob("*.parquet")):
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
            record = {**row, "identity": row.get(options.identity_column)}
            text = row.get(options.caption_column) or ""
            yield Photo(f"row {number}", content, text=str(text), **_face_fields(record))
    except DataError:
        raise
    except Exception as error:  # offline, gated, no such split, no picture: many types, one way out
        raise DataError(f"cannot read the dataset {source}: {error}") from error
