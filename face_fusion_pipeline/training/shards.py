"""WebDataset shards: tar files whose members that share a name up to the first dot are one sample."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.folders import is_litter
from ..files.texts import parse_json
from .photos import START, BrokenShardError, DataError, Photo, is_picture, shown
from .records import Fields, as_caption, face_fields


SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_SHARDS = 1_000_000  # that a pattern names
MEMBER = 2**28  # bytes of a member that is read
DESCRIPTIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"g", b"X")
HEADER = 2**20  # bytes of a member's own description
UNPACKED = 2**30  # bytes that any shard may unpack to,
RATIO = 100  # and times its size on disk: pictures can hardly be packed


def is_shard(path: Path) -> bool:
    """Whether a file is a shard, by its name."""
    return path.name.lower().endswith(SHARD_SUFFIXES)


def braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` -> a08.tar, a09.tar, a10.tar, as WebDataset writes a range of shards.

    Raises [`DataError`] for a range that names none, or far too many.
    """
    head, brace, rest = pattern.partition("{")
    span, close, tail = rest.partition("}")
    first, dots, last = span.partition("..")
    if not (brace and close and dots and _is_number(first) and _is_number(last)):
        return [pattern]
    ends, count = braces(tail), int(last) - int(first) + 1
    if not 1 <= count * len(ends) <= MOST_SHARDS:
        raise DataError(f"{pattern[:200]} names {count * len(ends):,} shards: give a range of 1 to {MOST_SHARDS:,}")
    return [f"{head}{number:0{len(first)}d}{end}" for number in range(int(first), int(last) + 1) for end in ends]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 18


class _Header(tarfile.TarInfo):
    """A member that may not describe itself at great length: tarfile reads all of that into memory."""

    def _proc_member(self, archive: Any) -> Any:
        if self.type in DESCRIPTIONS and self.size > HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


@dataclass
class _Sample:
    """What was read of one sample: a picture, and the best file of each other kind."""

    key: str = ""
    picture: bytes | None = None
    rank: int = 9
    others: list[str] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)

    def add_picture(self, content: bytes, middle: str) -> None:
        """Keep the picture that is called most plainly: `a.jpg` rather than `a.image.jpg`, that rather than others."""
        rank = 0 if not middle else 1 if middle in ("image", "img", "photo") else 2
        if self.picture is not None:
            self.others.append(f"another picture of {self.key}")
        if rank < self.rank:
            self.picture, self.rank = content, rank


@dataclass(frozen=True)
class ShardPiece:
    """The photos of one shard."""

    path: Path

    @property
    def key(self) -> str:
        return f"{self.path.name} {self.path.stat().st_size if self.path.exists() else 'missing'}"

    def photos(self) -> Iterator[Photo]:
        """Raises [`BrokenShardError`] where the file cannot be read on; what came before is good."""
        sample = _Sample()
        try:
            if self.path.exists() and not self.path.is_file():
                raise ValueError("it is no file")
            with tarfile.open(self.path, "r|*", tarinfo=_Header) as archive:
                for member in self._members(archive):
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if (key := f"{folder}/{stem}".lstrip("/")) != sample.key:
                        yield from self._photos(sample)
                        sample = _Sample(key)
                    if member.islnk() or member.issym():
                        if is_picture(base):
                            yield self._refused(key, "link in a shard", f"{member.name} is a link")
                    else:
                        _read(archive, member, suffix.lower(), sample)
        # tarfile raises anything from IndexError to OverflowError on a header that was made up
        except (
            tarfile.TarError, EOFError, OSError, ValueError, LookupError, ArithmeticError, MemoryError, zlib.error,
            lzma.LZMAError,
        ) as error:  # fmt: skip
            yield from self._photos(sample)
            where = sample.key or "its start"
            raise BrokenShardError(f"{self.path} cannot be read on after {where}: {error}") from error
        yield from self._photos(sample)

    def _members(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """Files and links, without litter. Raises ValueError for a shard that unpacks to far more than it is."""
        most, unpacked = max(UNPACKED, RATIO * self.path.stat().st_size), 0
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else all of them are kept in memory
            unpacked += member.size
            if unpacked > most:
                raise ValueError(f"it unpacks to more than {most:,} bytes, which no shard of photos does")
            if (member.isfile() or member.islnk() or member.issym()) and not any(
                is_litter(part) for part in member.name.split("/") if part not in (".", "..")
            ):
                yield member

    def _refused(self, key: str, reason: str, message: str) -> Photo:
        return Photo(shown(f"{self.path.name}/{key}"), b"", refused=(reason, message))

    def _photos(self, sample: _Sample) -> Iterator[Photo]:
        if sample.picture is None:
            return
        outer = Fields({"json": sample.texts.get(".json")})
        fields = Fields({**outer.read("json", _record, missing={}), "txt": sample.texts.get(".txt")})
        captions = (fields.read(name, as_caption) for name in ("txt", "text", "caption"))
        text = next(filter(None, captions), "")
        found = face_fields(fields)
        faults = (*outer.faults, *fields.faults)
        yield Photo(shown(f"{self.path.name}/{sample.key}"), sample.picture, text=text, **found, faults=faults)
        for message in sample.others:
            yield self._refused(sample.key, "second picture of a sample", message)


def _record(content: bytes) -> dict[str, Any]:
    record = parse_json(content)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, sample: _Sample) -> None:
    """Put a member into the sample if it is a picture, caption or record; `suffix` is all after the first dot."""
    middle, _, last = suffix.rpartition(".")
    file = archive.extractfile(member)
    start = file.read(START) if file is not None else b""
    wanted = f".{last}" in (".txt", ".json")
    if file is None or not (wanted or is_picture(member.name, start)):
        return
    if member.size > MEMBER:
        raise ValueError(f"{member.name} has {member.size:,} bytes, above {MEMBER:,}")
    content = start + file.read()
    if not wanted:
        sample.add_picture(content, middle if is_picture(f"a.{last}") else suffix)
    elif not middle or f".{last}" not in sample.texts:
        sample.texts[f".{last}"] = content
