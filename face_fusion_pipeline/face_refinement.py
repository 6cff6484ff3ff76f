"""A second pass for small faces: each is cut out, drawn again at the size that the model draws portraits in, put back.

A latent diffusion model has few cells for a face that is small in the picture. Drawn larger it has many, and so has
what the reference says of it. Image-to-image does it, from the face that is there, so that pose, light and expression
stay.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .face_axes import face_axes
from .face_errors import FaceAxesError, InvalidPromptError, InvalidScaleError
from .face_images import crop_box, load_image
from .face_layout import Box, assign_boxes, box_masks, check_box, visible_people
from .pipeline_img2img import StableDiffusionImg2ImgFaceFusionPipeline


logger = logging.getLogger(__name__)

CROP = 1.75  # side of what is drawn again over the longer side of the face box: a portrait with some room around it
WORTH = 1.25  # faces that would be enlarged less are large enough
# Chosen on avatars: about .55 where faces are enlarged 1.45 times, .8 where 2.06 times.
DEFAULT_STRENGTH, MOST_STRENGTH = 0.48, 0.8  # at the least enlargement, and ever
PER_PERSON = {"face_scale", "generator", "negative_prompt"}  # one for all, or a list with one for each person
SOFT_EDGE = 0.06  # standard deviation of the edge of what is put back, over the longer side of the face box


def refine_faces(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str],
    *,
    face_image: Any,
    face_boxes: Any = None,
    face_detector: Any = "auto",
    strength: float | None = None,
    **kwargs: Any,
) -> list[Image.Image]:
    """See [`StableDiffusionFaceFusionPipeline.refine_faces`]."""
    pictures = [load_image(picture) for picture in (image if isinstance(image, (list, tuple)) else [image])]
    casts = face_axes(face_image, len(pictures))
    places = [None] * len(pictures) if face_boxes is None else boxes_per_picture(face_boxes, len(pictures))
    steps = kwargs.get("num_inference_steps", 50)
    check_strength(DEFAULT_STRENGTH if strength is None else strength, steps)
    inner = pipe.as_pipeline(StableDiffusionImg2ImgFaceFusionPipeline)
    refined = []
    for index, (picture, boxes) in enumerate(zip(pictures, places, strict=True)):
        people = casts[index % len(casts)]
        if boxes is None:
            boxes = assign_boxes(pipe._detect_boxes(picture, face_detector), len(people))
        if len(boxes) != len(people):
            raise FaceAxesError(f"{len(boxes)} of face_boxes for {len(people)} people: give one for each person")
        prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt] * len(people)
        if len(prompts) != len(people) or not all(isinstance(text, str) for text in prompts):
            raise InvalidPromptError(f"give one prompt for all {len(people)} people or one for each, got {prompt!r}")
        for name in PER_PERSON & kwargs.keys():
            if isinstance(kwargs[name], (list, tuple)) and len(kwargs[name]) != len(people):
                raise FaceAxesError(
                    f"{len(kwargs[name])} values of {name} for {len(people)} people: give one, or one each"
                )
        boxes = [check_box(box, picture.height, picture.width) for box in boxes]
        refined.append(_refined(inner, picture, prompts, people, boxes, strength, **kwargs))
    return refined


def check_strength(strength: Any, steps: Any) -> None:
    """Raise [`InvalidScaleError`] unless `strength` is in (0, 1] and leaves at least one of `steps` to do."""
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise InvalidScaleError(f"strength must be above 0 and at most 1, got {strength!r}")
    if int(strength * steps) < 1:
        raise InvalidScaleError(f"strength {strength:g} of {steps} steps is not one step: give more steps or strength")


def boxes_per_picture(boxes: Any, pictures: int) -> list[list[Box]]:
    """`boxes` as pictures × people: those of one picture, also for all, or a list of these.

    Raises:
        FaceAxesError: neither one list nor one for each picture.
    """
    rows = [list(row) for row in boxes]
    nested = bool(rows) and bool(rows[0]) and isinstance(rows[0][0], (list, tuple, np.ndarray))
    rows = rows if nested else [rows]
    if len(rows) not in (1, pictures):
        raise FaceAxesError(f"face_boxes for {len(rows)} pictures, but there are {pictures}")
    return rows * pictures if len(rows) == 1 else rows


def strength_for(enlargement: float) -> float:
    """How much is drawn anew by default: the smaller a face came out, the less of it is worth keeping."""
    return min(DEFAULT_STRENGTH * enlargement / WORTH, MOST_STRENGTH)


def _refined(
    inner: Any,
    picture: Image.Image,
    prompts: list[str],
    people: list[Any],
    boxes: list[Box],
    strength: float | None,
    **kwargs: Any,
) -> Image.Image:
    """One person after the other, so that memory does not grow with them; all crops are of the first drawing."""
    side = inner._default_resolution()
    masks = visible_people(box_masks(boxes, picture.height, picture.width))
    refined = picture
    for i, (box, prompt, person) in enumerate(zip(boxes, prompts, people, strict=True)):
        enlargement = side / (CROP * longer_side(box))
        if enlargement < WORTH:
            continue
        square = square_around(box)
        crop = crop_box(picture, square).resize((side, side), Image.Resampling.LANCZOS)
        own = {
            name: value[i] if name in PER_PERSON and isinstance(value, (list, tuple)) else value
            for name, value in kwargs.items()
        }
        own["strength"] = strength_for(enlargement) if strength is None else strength
        result = inner(prompt, image=crop, face_image=person, **own)
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
    """`picture` with `face` in the place of `square`, where `mask` (H, W) is; its edge is `soft` pixels wide."""
    drawn = picture.copy()
    size = (square[2] - square[0], square[3] - square[1])
    drawn.paste(face.resize(size, Image.Resampling.LANCZOS), square[:2])
    inside = np.zeros_like(mask)
    rows, columns = slice(max(square[1], 0), max(square[3], 0)), slice(max(square[0], 0), max(square[2], 0))
    inside[rows, columns] = mask[rows, columns]
    blurred = Image.fromarray(255 * inside.astype(np.uint8)).filter(ImageFilter.GaussianBlur(soft))
    return Image.composite(drawn, picture, blurred)
