"""Who is evaluated: people with a reference photo and, where there are some, other photos of them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..face_errors import FaceFusionError
from ..training.sources import BrokenShardError, Photo, SourceOptions, open_source


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Person:
    """One person; the first photo is the reference, which a model is given, and it never sees the others.

    Photos that are not meant to be references (`as_reference: false` in the metadata) come last.
    """

    name: str
    photos: tuple[Photo, ...]

    @property
    def reference(self) -> Photo:
        return self.photos[0]

    @property
    def others(self) -> tuple[Photo, ...]:
        return self.photos[1:]

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that change with the reference photo."""
        content = self.reference.content
        if isinstance(content, Path):  # one that is no file is said to be unreadable later
            content = content.read_bytes() if content.is_file() else bytes(content)
        return hashlib.sha256(content).hexdigest()[:8]


def read_people(source: str | Path, limit: int | None = None, exclude: tuple[Path, ...] = ()) -> list[Person]:
    """People in the order of the source, `limit` of them at most.

    Args:
        source: whatever `face-fusion prepare` reads: a folder with one folder of photos for each person, a dataset of
            `avatars-dataset` or `prepare`, `.tar` shards, the Hub id of a dataset. Photos of several people are left
            out; a photo without an identity is a person of its own. What cannot be read is counted in a warning.
        exclude: folders in it that are not read, such as that of the results.

    Raises:
        DataError: nothing there. FaceFusionError: nobody in it.
    """
    photos: dict[str, list[Photo]] = {}
    for photo in _usable(source, SourceOptions(exclude=exclude)):
        photos.setdefault(photo.identity or photo.name, []).append(photo)
    if not photos:
        raise FaceFusionError(f"--identities {source} has no photo of a single person")
    return [
        Person(name, tuple(sorted(mine, key=lambda photo: not photo.as_reference)))
        for name, mine in list(photos.items())[:limit]
    ]


def _usable(source: str | Path, options: SourceOptions) -> Iterator[Photo]:
    """The photos of a single person; one warning about all else that cannot be read."""
    troubles: Counter[str] = Counter()
    for piece in open_source(source, options):
        try:
            for photo in piece.photos():
                troubles.update(f"field {field}" for field, _ in photo.faults)
                if photo.refused is not None:
                    troubles[photo.refused[0]] += 1
                elif photo.people in (None, 1):
                    yield photo
        except BrokenShardError as error:
            logger.warning("%s", error)
    if troubles:
        counted = ", ".join(f"{what} {number}" for what, number in troubles.most_common())
        logger.warning("--identities %s: left out: %s", source, counted)
