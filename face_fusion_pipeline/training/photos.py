"""A photo as a source has it, not yet decoded, and pieces of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from ..face_errors import FaceFusionError


# What cameras and programs call pictures. Not all of them can be read: those are counted, none is passed over.
PICTURE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "pjpeg", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff", "avif"),
        *("heic", "heif", "jp2", "j2k", "jxl", "tga", "ppm", "pgm", "pnm", "psd", "ico", "eps", "svg"),
        *("dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),
    )
)
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
START = 12  # bytes that tell a picture
Box = tuple[float, float, float, float]
Fault = tuple[str, str]  # a field, and what is wrong with it


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
        faults: what the source says of it that cannot be read; that alone is left out.
        refused: why the source itself cannot give it: what reports count it under, and a sentence. Else None.
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
    faults: tuple[Fault, ...] = ()
    refused: tuple[str, str] | None = None


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


def shown(name: str) -> str:
    """A file name as text that can be written anywhere: names of other times and systems may not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _describe(photo: Photo) -> str:
    """All that an example is made of; for a file its size and time of change stand for what is in it."""
    if isinstance(photo.content, bytes):
        content = hashlib.sha256(photo.content).hexdigest()
    else:
        state = photo.content.stat() if photo.content.exists() else None
        content = f"{photo.content} {state and (state.st_size, state.st_mtime_ns)}"
    return repr((content, *(str(getattr(photo, f.name)) for f in fields(photo) if f.name != "content")))


def is_picture(name: str, start: bytes = b"") -> bool:
    """Whether a file is a picture, by the last suffix of its name or by its first bytes."""
    if Path(name).suffix.lower() in PICTURE_SUFFIXES or start.startswith(_STARTS):
        return True
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def begins_as_picture(path: Path) -> bool:
    """[`is_picture`] of a file that has another suffix or none."""
    if is_picture(path.name):
        return True
    try:
        with open(path, "rb") as file:
            return is_picture(path.name, file.read(START))
    except OSError:
        return False
