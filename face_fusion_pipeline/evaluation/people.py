"""Who is evaluated: people with a reference photo and, where there are some, other photos of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..face_errors import FaceFusionError
from ..training.sources import Photo, open_source


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
        return hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content).hexdigest()[:8]


def read_people(source: str | Path, limit: int | None = None) -> list[Person]:
    """People in the order of the source, `limit` of them at most.

    Args:
        source: whatever `face-fusion prepare` reads: a folder with one folder of photos for each person, a dataset of
            `avatars-dataset` or `prepare`, `.tar` shards, the Hub id of a dataset. Photos of several people are left
            out; a photo without an identity is a person of its own.

    Raises:
        DataError: nothing there. FaceFusionError: nobody in it.
    """
    photos: dict[str, list[Photo]] = {}
    for piece in open_source(source):
        for photo in piece.photos():
            if photo.people in (None, 1):
                photos.setdefault(photo.identity or photo.name, []).append(photo)
    if not photos:
        raise FaceFusionError(f"--identities {source} has no photo of a single person")
    return [
        Person(name, tuple(sorted(mine, key=lambda photo: not photo.as_reference)))
        for name, mine in list(photos.items())[:limit]
    ]
