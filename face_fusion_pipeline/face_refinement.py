"""A second pass for small faces: each is cut out, drawn again at the size that the model draws portraits in, put back.

A latent diffusion model has few cells for a face that is small in the picture. Drawn larger it has many, and so has
what the reference says of it. Image-to-image does it, from the face that is there, so that pose, light and expression
stay.
"""

import logging
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .face_defaults import settings_of_pipeline
from .face_errors import FaceAxesError, FaceFusionError, InvalidLayoutError, InvalidPromptError, InvalidScaleError
from .face_images import crop_face
from .face_layout import Box, assign_boxes, box_masks, check_box, visible_people
from .face_people import face_axes, per_person, weights_per_person
from .face_pictures import load_images
from .face_places import Placement


logger = logging.getLogger(__name__)

CROP = 1.75  # side of what is drawn again over the longer side of the face box: a portrait with some room around it
WORTH = 1.25  # faces that would be enlarged less are large enough
# Chosen on avatars: about .55 where faces are enlarged 1.45 times, .8 where 2.06 times.
DEFAULT_STRENGTH, MOST_STRENGTH = 0.48, 0.8  # at the least enlargement, and ever
# One for all, or a list with one for each person:
PER_PERSON = {"face_scale", "face_self_scale", "generator", "negative_prompt"}
SOFT_EDGE = 0.06  # standard deviation of the edge of what is put back, over the longer side of the face box


def refine_faces(
    pipe: Any,
    image: Any,
    prompt: Any,
    people: Any,
    face_boxes: Any,
    detector: Any,
    strength: Any,
    max_face: Any,
    **kwargs: Any,
) -> list[Image.Image]:
    """See `TextToImageFaces.refine_faces`."""
    check_refinable(kwargs)
    check_max_face(max_face)
    pictures = load_images(image)
    groups = face_axes(people, len(pictures))
    places = None if face_boxes is None else Placement(boxes=face_boxes).per_prompt()
    if places is not None and len(places) not in (1, len(pictures)):
        raise FaceAxesError(f"face_boxes for {len(places)} pictures, but there are {len(pictures)}")
    check_strength(DEFAULT_STRENGTH if strength is None else strength, steps_of(pipe, kwargs))
    inner = pipe.as_pipeline(pipe._image_to_image_class())
    refined = []
    for index, picture in enumerate(pictures):
        group = groups[index % len(groups)]
        if places is None:
            boxes = assign_boxes(pipe._detect_boxes(picture, detector), len(group))
        else:
            boxes = places[index % len(places)]
        if len(boxes) != len(group):
            raise FaceAxesError(f"{len(boxes)} of face_boxes for {len(group)} people: give one for each person")
        prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt] * len(group)
        if len(prompts) != len(group) or not all(isinstance(text, str) for text in prompts):
            raise InvalidPromptError(f"give one prompt for all {len(group)} people or one for each, got {prompt!r}")
        each = {name: per_person(kwargs[name], [group], name)[0] for name in PER_PERSON & kwargs.keys()}
        if "face_weights" in kwargs:
            each["face_weights"] = weights_per_person(kwargs["face_weights"], [group])[0]
        own = [kwargs | {name: values[i] for name, values in each.items()} for i in range(len(group))]
        boxes = [check_box(box, picture.height, picture.width) for box in boxes]
        refined.append(_refined(inner, picture, prompts, group, boxes, strength, max_face, own))
    return refined


def check_refinable(arguments: dict[str, Any]) -> None:
    """Raise FaceFusionError for arguments of a call that mean nothing where one picture is drawn again."""
    for name, only in {"output_type": "pil", "num_images_per_prompt": 1, "return_dict": True}.items():
        if arguments.get(name, only) not in (only, None):
            raise FaceFusionError(
                f"refine_faces gives each picture back once, as a PIL image: leave {name}={arguments[name]!r} out"
            )


def steps_of(pipe: Any, arguments: dict[str, Any]) -> Any:
    """The number of steps of a call: given, or recommended by the model, or diffusers' own."""
    defaults = settings_of_pipeline(pipe)
    return arguments.get("num_inference_steps", (defaults and defaults.num_inference_steps) or 50)


def check_strength(strength: Any, steps: Any) -> None:
    """Raise [`InvalidScaleError`] unless `strength` is in (0, 1] and leaves at least one of `steps` to do."""
    if not isinstance(strength, Real) or not 0 < float(strength) <= 1:
        raise InvalidScaleError(f"strength must be above 0 and at most 1, got {strength!r}")
    if int(strength * steps) < 1:
        raise InvalidScaleError(f"strength {strength:g} of {steps} steps is not one step: give more steps or strength")


def check_max_face(pixels: Any) -> None:
    """Raise [`InvalidLayoutError`] unless it is None or a number above 0."""
    if pixels is not None and not (isinstance(pixels, Real) and float(pixels) > 0):
        raise InvalidLayoutError(f"max_face must be a number of pixels above 0, got {pixels!r}")


def strength_for(times: float) -> float:
    """How much of a face that is enlarged so is drawn anew by default: of a smaller one less is worth keeping."""
    return min(DEFAULT_STRENGTH * max(times / WORTH, 1.0), MOST_STRENGTH)


def enlargement(box: Box, side: int) -> float:
    """How many times larger a face is drawn again, by a model of pictures of `side` pixels."""
    return side / (CROP * longer_side(box))


def is_large(box: Box, side: int, max_face: float | None = None) -> bool:
    """Whether a face stays as it is: above `max_face` pixels or, by default, one that would hardly be enlarged."""
    return longer_side(box) > max_face if max_face is not None else enlargement(box, side) < WORTH


def _refined(
    inner: Any,
    picture: Image.Image,
    prompts: list[str],
    people: list[Any],
    boxes: list[Box],
    strength: float | None,
    max_face: float | None,
    own: list[dict[str, Any]],
) -> Image.Image:
    """One person after the other, so that memory does not grow with them; all crops are of the first drawing.

    `own` are the further arguments of each person's call. Who is not finished when the pipeline is told to stop stays
    as at first.
    """
    side = inner._default_resolution()
    masks = visible_people(box_masks(boxes, picture.height, picture.width))
    refined = picture
    for i, (box, prompt, person, arguments) in enumerate(zip(boxes, prompts, people, own, strict=True)):
        if is_large(box, side, max_face):
            continue
        square = square_around(box)
        crop = crop_face(picture, square, 1.0, side)
        again = strength_for(enlargement(box, side)) if strength is None else strength
        result = inner(prompt, image=crop, face_image=person, strength=again, **arguments)
        if inner.interrupt:
            break
        if any(getattr(result, "nsfw_content_detected", None) or []):
            logger.warning("the safety checker refused the second drawing of person %d: the first is kept", i)
            continue
        mask = masks[i].view(picture.height, picture.width).numpy()
        refined = put_back(refined, result.images[0], square, mask, SOFT_EDGE * longer_side(box))
    return refined


def longer_side(box: Box) -> float:
    """Of an XYXY box, in pixels."""
    return max(box[2] - box[0], box[3] - box[1])


def square_around(box: Box) -> tuple[int, int, int, int]:
    """The square, XYXY in whole pixels, that is drawn again for a face box; it may reach beyond the picture."""
    side = round(CROP * longer_side(box))
    left, top = round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2)
    return left, top, left + side, top + side


def put_back(
    picture: Image.Image, face: Image.Image, square: tuple[int, int, int, int], mask: np.ndarray, soft: float
) -> Image.Image:
    """`picture` with `face` in the place of `square`, where `mask` (H, W) is; its edge is `soft` pixels wide.

    Unlike diffusers' `apply_overlay`, beyond the square a soft edge fades into the picture and not into black.
    """
    drawn = picture.copy()
    size = (square[2] - square[0], square[3] - square[1])
    drawn.paste(face.resize(size, Image.Resampling.LANCZOS), square[:2])
    blurred = Image.fromarray(255 * mask.astype(np.uint8)).filter(ImageFilter.GaussianBlur(soft))
    return Image.composite(drawn, picture, blurred)
