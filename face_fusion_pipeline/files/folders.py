"""Folders that others filled: what in them is no data, where links lead, and names that lead out."""

from __future__ import annotations

import logging
import ntpath
import os
import posixpath
from pathlib import Path


logger = logging.getLogger(__name__)


# Made by notebooks, network disks and operating systems beside what people put there.
LITTER = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "__macosx",
    "__pycache__",
    "lost+found",
    "system volume information",
}
# Each a set of names by which a folder is known that a command wrote: its pictures are made of others, or generated.
OUTPUTS = (
    ("parts", "faces"),  # prepare
    ("face_fusion_adapter.safetensors",),  # train, average, push
    ("training.json", "logs"),
    ("settings.json", "images/metadata.jsonl"),  # evaluate
)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a machine for itself."""
    return name.startswith(".") or name.casefold() in LITTER


def is_output(folder: Path) -> bool:
    """Whether a command of this package wrote the folder."""
    return any(all((folder / name).exists() for name in names) for names in OUTPUTS)


def present(folder: Path, name: str, earlier: str) -> Path:
    """`folder / name`, or a file there that goes by its `earlier` name, with a line of warning."""
    if (folder / name).is_file() or not (folder / earlier).is_file():
        return folder / name
    logger.warning("%s: %s is called %s now", folder, earlier, name)
    return folder / earlier


def inside(folder: Path, name: str) -> Path:
    """The file that a list in `folder` calls `name`. Raises ValueError if that leads out of the folder."""
    for kind in (posixpath, ntpath):
        if kind.isabs(name) or kind.normpath(name).split(kind.sep)[0] == "..":
            raise ValueError(f"{name!r} leads out of {folder.name or folder}")
    if "\0" in name:
        raise ValueError(f"{name!r} is no file name")
    return folder / posixpath.normpath(name)


class Walk:
    """Which folders to enter below `root`: links are followed, and every folder is entered once.

    Args:
        root: where it begins.
        exclude: folders that are left out.
    """

    def __init__(self, root: Path, exclude: tuple[Path, ...] = ()) -> None:
        self.root = root.resolve()
        self.seen = {self.root, *(path.resolve() for path in exclude)}

    def enters(self, folder: Path) -> bool:
        """Whether to go on into `folder`, asked once for each."""
        real = folder.resolve()
        if real in self.seen or is_output(real):
            return False
        if folder.is_symlink() and (self.root.is_relative_to(real) or self._comes_by_itself(real)):
            return False
        self.seen.add(real)
        return True

    def _comes_by_itself(self, real: Path) -> bool:
        return real.is_relative_to(self.root) and not any(map(is_litter, real.relative_to(self.root).parts))

    def children(self, folder: Path) -> list[Path]:
        """What is in `folder` by name, without litter and without folders that are not to be entered.

        Raises OSError where it cannot be listed.
        """
        paths = sorted(Path(entry) for entry in os.scandir(folder) if not is_litter(entry.name))
        return [path for path in paths if not path.is_dir() or self.enters(path)]
