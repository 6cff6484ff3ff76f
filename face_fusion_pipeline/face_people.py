"""Who is in the pictures: `face_image` by its axes, and the identities of these people.

The axes are prompts × people × references. The depth of nesting says which of them are meant.

| given | means |
|---|---|
| image or `FaceIdentity` | one person |
| `[image, image]` | one person, several references |
| `[[image], [image, image]]`, `[identity, identity]` | several people, each with references |
| `[[[image]], [[image]]]`, `[[identity], [identity]]` | for each prompt its own people |

An axis that is not given is 1 and holds for all. Nothing is guessed from lengths: where the number of prompts, people
and images differs from what is expected, the call is refused with the shapes in the message.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Real
from typing import Any

from .conditioner import IdentityOptions, Person, conditioner_of, is_identity, mode_by
from .conditioner_face_snap import MODE as SNAP_MODE
from .conditioner_face_studio import MODE as STUDIO_MODE
from .face_errors import FaceAxesError, IdentityMismatchError, InvalidScaleError
from .face_familiarity import FALLBACK_MODE, UNFAMILIAR, familiarity_of, is_unfamiliar


logger = logging.getLogger(__name__)

MAX_FACE_SCALE = 100.0
MODE_WITH_WEIGHTS = "adapter"  # where weights are loaded and no mode is asked for: the paper


@dataclass(frozen=True)
class Wanted:
    """One person whom a call asks for: references or an identity, and the strengths of all and of self-attention."""

    face: Any
    scale: float
    self_scale: float | None


@dataclass(frozen=True)
class Faces:
    """What the caller says about who is seen, and how; the arguments `face_*` of the pipeline's call.

    Attributes:
        image: see the module; None: nobody.
        scale: strength in [0, 100]: 1 is the paper, 0 is exactly the plain pipeline. One, or one a person.
        self_scale: of the modes `"training-free"` and `"both"`: strength at the self-attention in [0, 100], which
            `scale` multiplies. Default: that of the identity, see `SelfAttentionReference`.
        weights: one number for each image, see `FaceFusionMixin.encode_face`; of several people one such list each.
        mode, resolution, mirrored: see `FaceFusionMixin.encode_face`.
        by: `"face-fusion"`, `"face-studio"` or `"face-snap"` (`identity_by`), who takes the image where several are
            loaded; default the first of them that is.
    """

    image: Any = None
    scale: float | Sequence[float] = 1.0
    self_scale: float | Sequence[float] | None = None
    weights: Any = None
    mode: str | None = None
    resolution: int | None = None
    mirrored: bool | None = None
    by: str | None = None

    def wanted(self, prompts: int | None) -> list[list[Wanted]]:
        """Prompts (1 or `prompts`) × people; nothing without an image.

        Raises:
            FaceAxesError, InvalidScaleError: see [`face_axes`], [`per_person`] and [`check_scale`].
        """
        groups = [] if self.image is None else face_axes(self.image, prompts)
        scales = per_person(self.scale, groups, "face_scale", check_scale)
        own = per_person(self.self_scale, groups, "face_self_scale", check_self_scale)
        rows = zip(groups, scales, own, strict=True)
        return [[Wanted(*person) for person in zip(*row, strict=True)] for row in rows]

    def options(self, wanted: list[list[Wanted]], lora_scale: float | None) -> list[IdentityOptions]:
        """What is asked of the identity of each person, one after the other. Raises [`FaceAxesError`]."""
        weights = weights_per_person(self.weights, [[person.face for person in row] for row in wanted])
        options = IdentityOptions(resolution=self.resolution, mirrored=self.mirrored, lora_scale=lora_scale)
        return [
            replace(options, weights=own, self_scale=person.self_scale)
            for person, own in zip(chain(*wanted), chain(*weights), strict=True)
        ]


def check_scale(scale: Any, name: str = "face_scale") -> float:
    """`scale` as a float in [0, 100]; raises [`InvalidScaleError`] otherwise."""
    number = float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else -1.0
    if not 0 <= number <= MAX_FACE_SCALE:
        raise InvalidScaleError(f"{name} must be a number from 0 (off) over 1 (the paper) to 100, got {scale!r}")
    return number


def check_self_scale(scale: Any, name: str) -> float | None:
    """As [`check_scale`]; None is the identity's own."""
    return None if scale is None else check_scale(scale, name)


def check_window(start: Any, end: Any) -> tuple[float, float]:
    """Both as they are; raises [`InvalidScaleError`] unless they are numbers with 0 <= start < end <= 1."""
    try:
        inside = 0 <= start < end <= 1
    except TypeError:
        inside = False
    if not inside:
        raise InvalidScaleError(f"need 0 <= face_start < face_end <= 1, got {start!r} and {end!r}")
    return start, end


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


# --- Identities ----------------------------------------------------------------------------------------------------


def usual_mode(pipe: Any) -> str:
    """The mode that is taken where none is asked for."""
    if pipe._face_adapter is None:
        loaded = {STUDIO_MODE: pipe.face_studio, SNAP_MODE: pipe.face_snap}
        return next((mode for mode, weights in loaded.items() if weights is not None), "training-free")
    return getattr(pipe.face_defaults, "face_mode", None) or MODE_WITH_WEIGHTS


def wanted_people(
    pipe: Any, faces: Faces, wanted: list[list[Wanted]], options: Sequence[IdentityOptions]
) -> list[tuple[Person, ...]]:
    """The people of a call, their identities encoded or looked at: prompts (1 or each) × people.

    Args:
        options: see [`Faces.options`].
    """
    mode = mode_by(pipe, faces.by, faces.mode)
    identities = iter(encode_people(pipe, [person.face for person in chain(*wanted)], mode, options))
    return [tuple(Person(next(identities), person.scale) for person in row) for row in wanted] or [()]


def encode_people(pipe: Any, faces: Sequence[Any], mode: str | None, options: Sequence[IdentityOptions]) -> list[Any]:
    """Identities of people who are to be seen together.

    Args:
        faces: of each person an identity, or what `encode_face` takes.
        mode: what is asked for. None: pictures beside an identity take its mode; else it is the [`usual_mode`] or,
            where the model has a judge that finds somebody unfamiliar, `FALLBACK_MODE` for all.
        options: of each.

    Raises:
        FaceFusionError: a subclass for each kind of bad input, such as an identity of another mode.
    """
    if mode is not None:
        conditioner_of(mode)  # refuses a name that nobody has
    ready = {face.mode for face in faces if is_identity(face)}
    judge = familiarity_of(pipe) if mode is None and not ready else None
    asked = mode or (ready.pop() if len(ready) == 1 else usual_mode(pipe))
    people = [
        _identity(pipe, face, mode, asked, replace(each, familiarity=judge))
        for face, each in zip(faces, options, strict=True)
    ]
    if judge is None or not any(is_unfamiliar(person) for person in people):
        return people
    logger.warning("%s; face_mode (--mode) decides otherwise", UNFAMILIAR)
    return [
        _identity(
            pipe,
            face,
            mode,
            FALLBACK_MODE,
            replace(each, familiarity=judge, self_attention=each.self_attention or judge.fallback),
        )
        for face, each in zip(faces, options, strict=True)
    ]


def _identity(pipe: Any, face: Any, given: str | None, mode: str, options: IdentityOptions) -> Any:
    """What one person's entry in `face_image` stands for."""
    if not is_identity(face):
        conditioner = conditioner_of(mode)
        encoded = conditioner.encode(pipe, face, options)
        return conditioner.adjusted(pipe, encoded, replace(options, weights=None))
    if given is not None and given != face.mode:
        raise IdentityMismatchError(f"the identity was encoded for {face.mode!r}, not {given!r}")
    return conditioner_of(face.mode).adjusted(pipe, face, options)
