"""Files and folders that appear whole or not at all: a stop, a full disk or another process leaves no half one."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..face_errors import FaceFusionError


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A hidden path in `folder`, which is made where it is missing, to write a file to.

    What was not moved from there is removed at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{secrets.token_hex(6)}.partial"  # no other process or thread has it
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Another path to write to: that file takes the place of `path` when the block ends well, and is removed else."""
    path = Path(path)
    with aside(path.parent) as partial:
        yield partial
        os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, or leave what was there."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def take_free_name(partial: Path, names: Iterable[Path]) -> Path:
    """Move a finished file to the first of `names` that nobody has, and that no other process can then take."""
    for path in names:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        os.replace(partial, path)
        return path
    raise FileExistsError(f"no name is free for a file in {partial.parent}")


@contextmanager
def new_folder(path: Path, option: str = "--out") -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well, and is removed else.

    Raises [`FaceFusionError`] if `path` holds anything.
    """
    check_new(path, option)
    path = path.resolve()
    partial = (path if path.is_dir() else path.parent) / f".{path.name[:100]}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir():  # may be where a disk is mounted, or where somebody stands: it stays the same folder
            for child in list(partial.iterdir()):
                child.rename(path / child.name)
            partial.rmdir()
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new(path: Path, option: str = "--out") -> None:
    """Raise [`FaceFusionError`] unless `path` is a folder with nothing but hidden files, or can become one."""
    check_writable(path, option)
    if path.is_dir() and (found := next((child for child in path.iterdir() if child.name[0] != "."), None)):
        raise FaceFusionError(f"{option} {path} exists and is no empty folder ({found.name} is there): name another")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise [`FaceFusionError`] unless files can be written to `folder`, which may not be there yet; leaves no trace.

    Found out by doing it: access rights alone say nothing of a read-only or special disk, or of too long a name.
    """
    try:
        whole = Path(os.path.abspath(folder))
        for place in (whole, *whole.parents):
            if os.path.lexists(place) and not place.is_dir():
                raise FaceFusionError(f"{option} {folder}: {place} is a file: name a folder")
        there = next(place for place in (whole, *whole.parents) if place.is_dir())
        # Beside `folder`, not in its place: another process may begin there.
        with tempfile.TemporaryDirectory(dir=there, prefix=".") as probe:
            Path(probe, whole.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except FaceFusionError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise FaceFusionError(f"{option} {folder} cannot be written to ({why}): name another folder") from error
