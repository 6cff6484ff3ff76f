"""The rows of one picture: one for each person it should show, with every figure that can be had.

A row is a flat dictionary that goes into a Parquet file: who, what and how, then the figures; what cannot be had
(no face found, nothing asked, no model for it) is missing. Columns that belong to a recogniser end in `[NAME]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..face_errors import FaceFusionError, UnreadableImageError
from ..face_pictures import load_image, open_picture
from ..generation.photos import FacePhoto
from ..training.sources import Photo
from .clip_score import ClipScore
from .copying import expression_difference, landmark_difference, pixel_agreement, pose_difference, yaw
from .generation import BLACKED_OUT
from .metrics import copy_paste_score, cosine_similarity
from .observation import Observation, Observer
from .people import Person
from .pictures import ANOTHER_PHOTO, Picture


Row = dict[str, Any]


@dataclass(frozen=True)
class KnownPerson:
    """The photos of a person as they are seen: the reference, and the others by the number of the photo."""

    reference: Observation
    others: dict[int, Observation]


@dataclass
class PicturePanel:
    """Everything that looks at a picture; the photos of each person are looked at once.

    `unusable` says why photos of people were left out, by the name of the photo; `mark` changes with the files of the
    models that look.
    """

    people: dict[str, Person]
    observer: Observer
    clip: ClipScore | None = None
    mark: str = ""
    unusable: dict[str, str] = field(default_factory=dict)
    _known: dict[str, KnownPerson | None] = field(default_factory=dict)

    @property
    def description(self) -> list[str]:
        """Names all that look at a picture: the rows of another panel are other rows."""
        observer = self.observer
        optional = [each.name for each in (observer.expression, self.clip) if each is not None]
        return [observer.finder.detector.name, *(r.name for r in observer.recognisers), *optional, self.mark]

    def known(self, name: str) -> KnownPerson | None:
        """The photos of a person; None where the reference shows no face."""
        if name not in self._known:
            seen = {}
            for number, photo in enumerate(self.people[name].photos):
                try:
                    seen[number] = self._see(photo)
                except FaceFusionError as error:
                    self.unusable[photo.name] = str(error)
            reference = seen.pop(0, None)
            self._known[name] = None if reference is None else KnownPerson(reference, seen)
        return self._known[name]

    def _see(self, photo: Photo) -> Observation:
        """The face of a photo of one person, by the detector's landmarks as in every picture, else by those known.

        Raises FaceFusionError where there is no face.
        """
        image, meant = self.observer.finder.photo(photo)
        x, y = (meant.box[0] + meant.box[2]) / 2, (meant.box[1] + meant.box[3]) / 2
        for seen in sorted(self.observer.observe(image), key=lambda seen: -seen.face.height):
            x0, y0, x1, y1 = seen.face.box
            if x0 <= x <= x1 and y0 <= y <= y1 and seen.crop is not None:
                return seen
        return self.observer.look_at(image, meant)

    def reference_photo(self, name: str) -> FacePhoto:
        """The reference of a person with the face that is meant. Raises FaceFusionError where there is none."""
        return FacePhoto(*self.observer.finder.photo(self.people[name].reference))

    def rows(self, picture: Picture) -> list[Row]:
        """One row for each person of a picture.

        Raises UnreadableImageError if its file cannot be read, or shows nothing but that a safety checker was there.
        """
        image = load_image(picture.source)
        if isinstance(picture.source, Path) and is_blacked_out(picture.source):
            raise UnreadableImageError("the model's safety checker blacked it out")
        found = self.observer.observe(image)
        known = [self.known(name) for name in picture.people]
        matches = match(known, found)
        shared: Row = self.clip.score(image, picture.prompt) if self.clip is not None else {}
        if len(picture.people) > 1:
            missing = sum(face is None for face in matches)
            shared |= {"missing_faces": missing, "all_present": float(missing == 0)}
        shared["extra_faces"] = max(0, len(found) - len(picture.people))
        rows = []
        for place, (name, face, mine) in enumerate(zip(picture.people, matches, known, strict=True)):
            row = {
                "method": picture.method,
                "identity": name,
                "group": picture.group,
                "place": place,
                "prompt": picture.prompt,
                "seed": picture.seed,
                "reference": self.people[name].reference.name,
                "file": picture.name,
                "face_found": float(face is not None),
                **shared,
            }
            if face is not None and mine is not None:
                neighbours = [other.reference for other in known if other is not None and other is not mine]
                row |= self.compare(face, mine.reference, self.ground_truth(picture, name, mine), neighbours)
            rows.append(row)
        return rows

    def ground_truth(self, picture: Picture, name: str, known: KnownPerson) -> list[Observation]:
        """The other photos of a person, without the picture itself where that is one of them."""
        photos = self.people[name].photos
        itself = picture.method == ANOTHER_PHOTO
        return [seen for i, seen in known.others.items() if not (itself and photos[i].content == picture.source)]

    def compare(
        self,
        face: Observation,
        reference: Observation,
        others: Sequence[Observation],
        neighbours: Sequence[Observation],
    ) -> Row:
        """The figures of one face; `others` are further photos of its person, `neighbours` are not its person."""
        row: Row = {}
        if face.crop is None or reference.crop is None:
            return row
        for name, own in face.embeddings.items():
            given = reference.embeddings[name]
            row[f"distance[{name}]"] = 1 - float(cosine_similarity(own, given))
            if truth := [other.embeddings[name] for other in others if name in other.embeddings]:
                row[f"similarity_other[{name}]"] = float(np.mean([cosine_similarity(own, t) for t in truth]))
                row[f"copy_paste[{name}]"] = float(np.mean([copy_paste_score(own, given, t) for t in truth]))
            if known := [other.embeddings[name] for other in neighbours if name in other.embeddings]:
                strangers = [cosine_similarity(own, other) for other in known]
                row[f"similarity_own[{name}]"] = float(cosine_similarity(own, given))
                row[f"similarity_neighbour[{name}]"] = float(np.mean(strangers))
        row["yaw"], row["yaw_reference"] = yaw(face.rotation), yaw(reference.rotation)
        row["pose_difference"] = pose_difference(face.rotation, reference.rotation)
        row["landmark_difference"] = landmark_difference(face.landmarks, reference.landmarks)
        if face.expression is not None and reference.expression is not None:
            row["expression_difference"] = expression_difference(face.expression, reference.expression)
        row |= pixel_agreement(face.crop, reference.crop)
        return {name: value for name, value in row.items() if math.isfinite(value)}


def is_blacked_out(path: Path) -> bool:
    return BLACKED_OUT in open_picture(path).info


def match(known: Sequence[KnownPerson | None], found: Sequence[Observation]) -> list[Observation | None]:
    """The face of each person among those found, at most one each: the greatest sum of similarities (Hungarian).

    Without a recogniser, and for people whose reference cannot be compared, similarities are 0; then the largest faces
    are taken, which for several people says nothing about who is who.
    """
    if not found:
        return [None] * len(known)
    largest = max(face.face.height for face in found)
    table = np.array([[1e-6 * face.face.height / largest for face in found] for _ in known])
    for i, person in enumerate(known):
        for j, face in enumerate(found):
            given = person.reference.embeddings if person is not None else {}
            scores = [cosine_similarity(own, given[name]) for name, own in face.embeddings.items() if name in given]
            table[i, j] += np.mean(scores) if scores else 0.0
    people, faces = linear_sum_assignment(table, maximize=True)
    matched = dict(zip(people.tolist(), faces.tolist(), strict=True))
    return [found[matched[i]] if i in matched else None for i in range(len(known))]
