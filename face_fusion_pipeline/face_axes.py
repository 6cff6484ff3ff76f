"""The three axes of `face_image`: prompts × people × references. The depth of nesting says which axes are meant.

| given | means |
|---|---|
| image or `FaceIdentity` | one person |
| `[image, image]` | one person, several references |
| `[[image], [image, image]]`, `[identity, identity]` | several people, each with references |
| `[[[image]], [[image]]]`, `[[identity], [identity]]` | for each prompt its own people |

An axis that is not given is 1 and holds for all. Nothing is guessed from lengths: where the number of prompts, people
and images differs from what is expected, the call is refused with the shapes in the message.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

from .face_errors import FaceAxesError


def is_identity(face: Any) -> bool:
    """Whether `face` is an identity of a conditioner; a class loaded through diffusers is not the installed one, hence
    no type."""
    return isinstance(getattr(face, "n_refs", None), int) and isinstance(getattr(face, "mode", None), str)


def depth(face: Any) -> int:
    """How deep `face` is nested: 0 for an image, 1 for the references of one person, also as identity or batch.

    Raises:
        FaceAxesError: an empty list, or a list whose members are nested to different depths.
    """
    if is_identity(face):
        return 1
    if not isinstance(face, (list, tuple)):
        return 1 if getattr(face, "ndim", 3) == 4 else 0
    if not face:
        raise FaceAxesError("face_image has an empty list in it: give at least one image of each person")
    depths = {depth(member) for member in face}
    if len(depths) > 1:
        raise FaceAxesError(
            f"face_image mixes levels in {describe(face)}: write one list of images for each person, "
            "[[image], [image, image]], or one FaceIdentity each"
        )
    return 1 + depths.pop()


def describe(face: Any) -> str:
    """The nesting of `face` in brackets, such as `[[image, image], [identity]]`."""
    if isinstance(face, (list, tuple)):
        return f"[{', '.join(describe(member) for member in face)}]"
    return "identity" if is_identity(face) else "image"


def face_axes(face: Any, prompts: int | None) -> list[list[Any]]:
    """`face` as prompts (1 or `prompts`) × people, each member the references of one person.

    Args:
        face: see the module.
        prompts: number of prompts in the call; None if unknown.

    Raises:
        FaceAxesError: nested too deep, mixed, or neither one entry nor one for each prompt.
    """
    levels = depth(face)
    if levels > 3:
        raise FaceAxesError(f"face_image is nested {levels} deep: at most prompts, people and references")
    groups = [[face]] if levels < 2 else [list(face)] if levels == 2 else [list(people) for people in face]
    if prompts is not None and len(groups) not in (1, prompts):
        raise FaceAxesError(
            f"face_image has people for {len(groups)} prompts, but there are {prompts}: give one list of people for "
            f"each prompt, or one for all; got {describe(face)}"
        )
    return groups


def weights_per_person(weights: Any, groups: list[list[Any]]) -> list[list[Any]]:
    """The reference weights of each person (prompts × people as in `groups`), each a list of numbers or None.

    Args:
        weights: None, the numbers of a single person, or a list with those of each person.

    Raises:
        FaceAxesError: several people, but not a list of numbers for each.
    """
    if weights is None or sum(map(len, groups)) < 2:  # nobody, where a style alone is asked for
        return [[weights] * len(people) for people in groups]
    nested = isinstance(weights, (list, tuple))
    if not nested or any(isinstance(member, Real) or getattr(member, "ndim", 1) == 0 for member in weights):
        example = [[1] * (face.n_refs if is_identity(face) else len(face)) for face in groups[0]]
        counts = " and ".join(str(len(people)) for people in groups)
        raise FaceAxesError(
            f"face_weights={weights!r} for {counts} people: give each person a list with one number for each of its "
            f"images, such as {example}; numbers alone shift between the images of one person"
        )
    return per_person(weights, groups, "face_weights")


def per_person(
    value: Any, groups: list[list[Any]], name: str, check: Callable[[Any, str], Any] = lambda value, name: value
) -> list[list[Any]]:
    """One value for all, or one for each person (prompts × people as in `groups`).

    Raises:
        FaceAxesError: a list whose length is not the number of people.
    """
    if not isinstance(value, (list, tuple)):
        checked = check(value, name)
        return [[checked] * len(people) for people in groups]
    for people in groups:
        if len(value) != len(people):
            raise FaceAxesError(f"{len(value)} values of {name} for {len(people)} people: give one, or one for each")
    return [[check(member, name) for member in value] for _ in groups]
