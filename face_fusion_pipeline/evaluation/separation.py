"""Whether a recogniser tells the people of an evaluation apart at all: one that does not has nothing to say of them.

Evaluators that were trained on renders, for example, see other things in photographs than who it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..face_errors import FaceFusionError
from .metrics import cosine_similarity
from .picture_rows import KnownPerson, PicturePanel


MOST_PEOPLE = 50  # that are looked at: enough to see whether it works
LEAST_GAP = 0.25  # of cosine similarity; on pictures of its kind a recogniser has .3 to .8


@dataclass(frozen=True)
class Separation:
    """Mean cosine similarity of reference photos to other photos of the person, and to those of the next person."""

    person: float
    stranger: float

    def __str__(self) -> str:
        return f"a stranger {self.stranger:.3f}, the person {self.person:.3f}"


def separation(panel: PicturePanel) -> dict[str, Separation]:
    """By recogniser; empty with fewer than two people who have a second photo with a face."""
    people = [known for name in list(panel.people)[:MOST_PEOPLE] if (known := panel.known(name)) and known.others]
    found = {}
    for name in (recogniser.name for recogniser in panel.observer.recognisers):
        seen = [person for person in people if name in person.reference.embeddings]
        own = [_to_others(person, name) for person in seen]
        strangers = [
            float(cosine_similarity(a.reference.embeddings[name], b.reference.embeddings[name]))
            for a, b in zip(seen, [*seen[1:], *seen[:1]], strict=True)
        ]
        if len(seen) > 1:
            found[name] = Separation(float(np.nanmean(own)), float(np.mean(strangers)))
    return found


def _to_others(person: KnownPerson, name: str) -> float:
    given = person.reference.embeddings[name]
    others = [other.embeddings[name] for other in person.others.values() if name in other.embeddings]
    return float(np.mean([cosine_similarity(given, other) for other in others])) if others else float("nan")


def check_recognisers(panel: PicturePanel) -> dict[str, str]:
    """Recognisers whose figures say little about these people, and why.

    Raises FaceFusionError for evaluators of one kind of picture, such as avatars, that take strangers for the person.
    """
    trained = getattr(panel.observer.finder.locator, "name", None)
    doubts = {}
    for name, seen in separation(panel).items():
        kind = ", which was trained on renders of avatars," if name == trained else ""
        if name == trained and seen.stranger >= seen.person:
            raise FaceFusionError(
                f"the {name}{kind} takes strangers for the person on these photos ({seen}): for photographs give "
                "--no-evaluators, and a recogniser of photographs, --recogniser NAME=FILE.onnx or insightface"
            )
        if not seen.person - seen.stranger >= LEAST_GAP:
            doubts[name] = f"it hardly tells these people apart ({seen}); its figures of likeness say little" + (
                ": it was trained on renders of avatars, so for photographs give --recogniser" if kind else ""
            )
    return doubts
