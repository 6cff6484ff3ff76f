"""What a user asks for, and the checks of it that need no model. No widgets here."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ..conditioner_face_studio import STYLE_SCALE, Style
from ..face_defaults import FACE_MODES
from ..face_errors import FaceFusionError
from ..face_landmarks import ANGLES
from ..face_layout import Box
from ..face_loader_mixin import check_scale
from ..generation.arguments import MAX_SEED, check_prompt


MAX_PEOPLE, MAX_PHOTOS, MAX_PICTURES, MAX_STEPS = 3, 8, 8, 200
LEAST_REFINING = 3  # steps: a part of them is done again
MAX_RATIO = 4  # of the sides of a picture whose shape is followed: beyond, the shorter one has too few pixels

AS_WRITTEN = "as written"
STYLES = (AS_WRITTEN, "pencil sketch", "watercolor", "faded film", "line art")  # what the embedded model knows
MORE_STYLES = ("photo", "oil painting", "comic book", "clay figure")  # for checkpoints that know more

MOST_TURNED, MOST_POSED = 45, 1.5  # degrees of a head that is turned by numbers; strength of a pose
TURNS = ("Turn left or right", "Up or down", "Tilt")  # what yaw, pitch and roll are called on the page
AS_IN_PHOTO = "as in the photo"  # of an expression
WITHOUT_POSE = "remove the pose photo, the numbers and the expression"

RECOMMENDED = "as the model recommends"
MODES = (RECOMMENDED, *FACE_MODES)  # how faces join a picture

ONLY_FACE, WHOLE_PHOTO = "the only one", "the photo is cropped to a face"
WHICH_FACE = (
    ONLY_FACE,
    "1st from the left",
    "2nd from the left",
    "3rd from the left",
    "4th from the left",
    WHOLE_PHOTO,
)


class FieldError(FaceFusionError):
    """Bad input that belongs to one field of the form: `person_1` to `person_3`, `prompt`, `seed`, `places`, ...

    Attributes:
        also: what is wrong with other fields.
    """

    def __init__(self, field: str, message: object, also: "Sequence[FieldError]" = ()) -> None:
        super().__init__(str(message))
        self.field, self.also = field, tuple(also)


@dataclass(frozen=True)
class PersonForm:
    """One person: photos, or an identity that was saved.

    Attributes:
        number: 1 to 3, as shown.
        which: one of `WHICH_FACE`, which face of the photos is meant.
        strength: `face_scale`, >= 0.
    """

    number: int
    photos: tuple[Path, ...] = ()
    identity: Any = None
    which: str = ONLY_FACE
    strength: float = 1.0

    @property
    def field(self) -> str:
        return f"person_{self.number}"

    @property
    def is_given(self) -> bool:
        return bool(self.photos) or self.identity is not None

    @property
    def face_index(self) -> int | None:
        """Which face, counted from 0 and from the left; None: the only one."""
        return None if self.which in (ONLY_FACE, WHOLE_PHOTO) else WHICH_FACE.index(self.which) - 1

    def check(self) -> None:
        """Raise [`FieldError`] for more photos than are worth their time."""
        if len(self.photos) > MAX_PHOTOS:
            raise FieldError(self.field, f"{len(self.photos)} photos: keep the best {MAX_PHOTOS} or fewer")


@dataclass(frozen=True)
class PoseForm:
    """Pose and expression of the person, in place of those that the prompt would bring.

    Attributes:
        driver: the `FaceFit` of a face in another photo, whose pose and expression are taken; None: the person's own.
        turned: yaw, pitch and roll in degrees that take the place of the photo's, see `face_landmarks.Pose`, or None.
        expression: a name of the face model that takes the place of the photo's, or None.
        strength: of FaceSnap's ControlNet, see `controlnet_conditioning_scale` of diffusers.
    """

    driver: Any = None
    turned: tuple[float, float, float] | None = None
    expression: str | None = None
    strength: float = 1.0

    @property
    def is_given(self) -> bool:
        return any(given is not None for given in (self.driver, self.turned, self.expression))

    @property
    def text(self) -> dict[str, object]:
        """What the pictures say of it: nothing of the other photo but that there was one; nothing without a pose."""
        if not self.is_given:
            return {}
        angles = dict(zip(ANGLES, self.turned or (), strict=False))
        return {"posed": True, **angles, "expression": self.expression, "control_scale": self.strength}

    def check(self, people: Sequence[PersonForm]) -> None:
        """Raise [`FieldError`] for a pose that cannot be given to these people, or a number out of range."""
        if not self.is_given:
            return
        if len(people) > 1:
            words = f"a pose is for one person, and {len(people)} are given"
            raise FieldError("driver", f"{words}: take the others away, or {WITHOUT_POSE}")
        if any(person.identity is not None for person in people):
            words = "a saved identity holds no photo, which the shape of the face is read from"
            raise FieldError("driver", f"{words}: add a photo of the person, or {WITHOUT_POSE}")
        for name, value in zip(TURNS, self.turned or (), strict=False):
            if not isinstance(value, Real) or not abs(float(value)) <= MOST_TURNED:
                raise FieldError("driver", f"“{name}” must be from {-MOST_TURNED} to {MOST_TURNED}, got {value}")
        if not isinstance(self.strength, Real) or not 0 <= float(self.strength) <= MOST_POSED:
            raise FieldError("driver", f"the strength must be from 0 to {MOST_POSED}, got {self.strength}")


@dataclass(frozen=True)
class Form:
    """All that one press of “Generate” asks for.

    Attributes:
        people: those who are given, at least one.
        boxes: person's number -> face box XYXY in [0, 1] of the picture's width and height; may be empty.
        control: picture whose depth is to be followed, an RGB image, or None.
        style_picture: picture whose style is taken by FaceStudio, an RGB image, or None.
        style_scale: how much of it, from 0 to 1.
        pose: pose and expression of the only person, if any are asked for.
        layout_size: (width, height) of the picture that the boxes were drawn on, or None.
        low_noise_guidance: whether guidance is halved in the low-noise half of the timesteps.
        compare: whether each picture is made without faces, too.
        mode: one of `MODES`.
        refine: whether faces that came out small are drawn again, larger.
    """

    people: tuple[PersonForm, ...]
    prompt: str
    style: str = AS_WRITTEN
    negative_prompt: str = ""
    seed: int = 0
    count: int = 2
    steps: int = 25
    guidance: float = 5.0
    low_noise_guidance: bool = False
    compare: bool = False
    refine: bool = False
    boxes: dict[int, Box] | None = None
    control: Any = None
    style_picture: Any = None
    style_scale: float = STYLE_SCALE
    pose: PoseForm = PoseForm()
    layout_size: tuple[int, int] | None = None
    mode: str = RECOMMENDED

    @property
    def face_mode(self) -> str | None:
        """As `FaceFusionMixin.encode_face` takes it."""
        return None if self.mode == RECOMMENDED else self.mode

    @property
    def shape(self) -> tuple[int, int] | None:
        """(width, height) of the picture whose shape the results take, or None."""
        return self.layout_size if self.control is None else self.control.size

    @property
    def guidance_in_low_noise_half(self) -> float | None:
        """Half of the guidance, if that was asked for and is guidance still; None: as before."""
        return self.guidance / 2 if self.low_noise_guidance and self.guidance > 2 else None

    @property
    def style_of_picture(self) -> dict[str, Any]:
        """Arguments of a pipeline's call; none without a style picture.

        Of one person the picture takes the place of the words, so that 1 is the picture alone. Several people keep the
        words, as the weights say: without them they may melt into one.
        """
        if self.style_picture is None:
            return {}
        context = "replace" if len(self.people) == 1 else None
        return {"style_image": self.style_picture, "style_scale": self.style_scale, "style_context": context}

    @property
    def full_prompt(self) -> str:
        """The prompt with the style."""
        return self.prompt if self.style == AS_WRITTEN else f"{self.prompt}, {self.style}"

    @property
    def prompt_of_one(self) -> str:
        """What is seen of each person alone, where faces are drawn again."""
        one = self.prompt if len(self.people) == 1 else "a photo of a person"
        return one if self.style == AS_WRITTEN else f"{one}, {self.style}"

    @property
    def face_boxes(self) -> list[Box] | None:
        """Boxes in the order of the people, or None: nothing was drawn."""
        return [self.boxes[person.number] for person in self.people] if self.boxes else None

    def check(self) -> None:
        """Raise [`FieldError`] for the first field that is wrong."""
        if not self.people:
            raise FieldError("person_1", "add a photo of the person, load an identity, or take one of the examples")
        for person in self.people:
            person.check()
            in_field(person.field, check_scale, person.strength, "the strength")
        in_field("prompt", check_prompt, self.prompt, "the prompt")
        if self.negative_prompt:
            in_field("negative_prompt", check_prompt, self.negative_prompt, "what not to show")
        if not 0 <= self.seed <= MAX_SEED - MAX_PICTURES:
            raise FieldError("seed", f"the seed must be from 0 to {MAX_SEED - MAX_PICTURES}, got {self.seed}")
        for field, value, most in (("count", self.count, MAX_PICTURES), ("steps", self.steps, MAX_STEPS)):
            if not 1 <= value <= most:
                raise FieldError(field, f"this must be from 1 to {most}, got {value}")
        if self.refine and self.steps < LEAST_REFINING:
            raise FieldError("steps", f"to draw small faces again takes {LEAST_REFINING} steps or more")
        if not isinstance(self.guidance, Real) or not 0 <= self.guidance <= 100:
            raise FieldError("guidance", f"this must be from 0 to 100, got {self.guidance}")
        if self.style_picture is not None:
            in_field("style_picture", Style(self.style_picture, self.style_scale).check)
        self.pose.check(self.people)
        if self.boxes:
            self._check_boxes(self.boxes)
        if self.shape is not None and max(self.shape) > MAX_RATIO * min(self.shape):
            width, height = self.shape
            words = f"its longer side may be at most {MAX_RATIO} times the shorter one"
            raise FieldError("places", f"the picture to follow is {width} × {height} pixels: {words}")

    def _check_boxes(self, boxes: dict[int, Box]) -> None:
        given = {person.number for person in self.people}
        if absent := sorted(boxes.keys() - given):
            raise FieldError("places", f"person {absent[0]} has a box, but no photo: add one, or clear the boxes")
        if missing := sorted(given - boxes.keys()):
            raise FieldError("places", f"person {missing[0]} has no box: draw one, or clear all boxes")


def whole_number(field: str, value: Any) -> int:
    """`value` of a number field as an integer. Raises [`FieldError`]: empty, not a number, with a fraction."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and value % 1 == 0:
        return int(value)
    raise FieldError(field, f"this must be a whole number, got {'nothing' if value is None else value}")


def in_field(field: str, check: Any, *args: Any) -> Any:
    """`check(*args)`, whose [`FaceFusionError`] becomes the [`FieldError`] of this field."""
    try:
        return check(*args)
    except FaceFusionError as error:
        raise FieldError(field, error) from error
