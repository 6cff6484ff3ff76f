"""Where people go in a picture: given, found in a layout picture, found in a draft without faces, or side by side."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .call_arguments import Call
from .conditioner import Person, PictureRow
from .face_errors import FaceAxesError, InvalidLayoutError
from .face_layout import (
    BACKGROUNDS,
    OVERLAPS,
    Background,
    Layout,
    Overlap,
    assign_boxes,
    even_boxes,
    given_masks,
    layer_regions,
    layout_from_boxes,
    scale_boxes,
)
from .face_pictures import load_images


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """What the caller says about where people go; the arguments `face_*` of the pipeline's call.

    Several people without boxes, masks and layout: a draft without faces is generated first, as an ordinary call with
    its callbacks, and takes the layout's place.

    Attributes:
        boxes: XYXY in pixels of the output, one for each person, or one such list for each prompt. The person's mask
            is the box enlarged 1.6 times.
        masks: instead of boxes one mask for each person: path, image or array (H, W), see `face_layout.read_mask`.
        layout: instead of boxes a picture with as many faces, which are detected, or a list with one picture for each
            prompt.
        assign: for each person the number of the face in the layout or draft that it takes, counted from 0 and from
            left to right. Default: people as given, from left to right.
        overlap, background: what queries in several masks, and in none, see: see `face_layout.visible_people`;
            `"literal"` and `"all"` are Eq. 7 of the paper.
        detector: see `face_detectors.load_detector`.
    """

    boxes: Any = None
    masks: Any = None
    layout: Any = None
    assign: Sequence[int] | None = None
    overlap: Overlap = "nearest"
    background: Background = "none"
    detector: Any = "auto"

    @property
    def given(self) -> str | None:
        """The one argument that says it, or None."""
        return next(iter(self._given()), None)

    def _given(self) -> list[str]:
        said = {"face_boxes": self.boxes, "face_masks": self.masks, "face_layout": self.layout}
        return [name for name, value in said.items() if value is not None]

    def check(self) -> None:
        """Raise [`InvalidLayoutError`] where arguments exclude each other or are unknown words."""
        names = self._given()
        if len(names) > 1:
            raise InvalidLayoutError(f"{' and '.join(names)} say the same thing twice: give one of them")
        if self.assign is not None and (self.boxes is not None or self.masks is not None):
            raise InvalidLayoutError(
                f"face_assign chooses among faces that are found; {names[0]} are taken in the order of the people"
            )
        if self.assign is not None and len(set(self.assign)) != len(self.assign):
            raise InvalidLayoutError(f"face_assign must name different faces, got {list(self.assign)}")
        for name, value, allowed in (
            ("face_overlap", self.overlap, OVERLAPS),
            ("face_background", self.background, BACKGROUNDS),
        ):
            if value not in allowed:
                raise InvalidLayoutError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def per_prompt(self) -> list[list[Any]]:
        """The boxes or masks as prompts (1 or more) × people. A box is flat, a mask has two axes."""
        places = self.boxes if self.boxes is not None else self.masks
        levels = _levels(places) - (0 if self.boxes is not None else 1)
        if levels == 2:
            return [list(places)]
        if levels == 3:
            return [list(row) for row in places]
        raise InvalidLayoutError(f"{self.given} must be a list with one entry for each person, got {places!r}")


def _levels(places: Any) -> int:
    """Depth of nesting down to the numbers; an image and its file count as two axes."""
    if isinstance(places, (Image.Image, str, os.PathLike, bytes)):
        return 2
    if isinstance(places, (np.ndarray, Tensor)):
        return int(places.ndim)
    return 1 + (_levels(places[0]) if len(places) else 0) if isinstance(places, (list, tuple)) else 0


def place_people(pipe: Any, placement: Placement, people: list[int], call: Call) -> list[Layout]:
    """One layout for all images, or one for each prompt or image; none if nobody has to be placed.

    Args:
        people: number of people, for all prompts or for each.
        call: of the underlying pipeline, for its size, and for a draft.

    Raises:
        FaceFusionError: a subclass for each kind of bad input.
    """
    placement.check()
    if placement.given is None:
        return draft_layouts(pipe, placement, people, call) if max(people) > 1 or pipe._needs_layout() else []
    height, width = pipe._output_size(call.arguments)
    if placement.layout is not None:
        return found_layouts(pipe, placement, people, call.prompts, height, width)
    given = placement.per_prompt()
    if len(given) not in (1, len(people)) and len(people) != 1:
        raise FaceAxesError(f"{placement.given} for {len(given)} prompts, people for {len(people)}")
    if len(given) not in (1, call.prompts):
        raise FaceAxesError(f"{placement.given} for {len(given)} prompts, but there are {call.prompts}")
    layouts = []
    for row in range(max(len(given), len(people))):
        places, count = given[row % len(given)], people[row % len(people)]
        if len(places) != count:
            raise FaceAxesError(
                f"{len(places)} of {placement.given} for {count} people: give one for each person; a flat list of "
                "images is one person with several references, [[image], [image]] is two people"
            )
        if placement.given == "face_boxes":
            layouts.append(layout_from_boxes(places, height, width, "given"))
        else:
            layouts.append(Layout(given_masks(places, height, width), None, "given"))
    return layouts


def found_layouts(
    pipe: Any, placement: Placement, people: list[int], prompts: int, height: int, width: int
) -> list[Layout]:
    """The faces found in the layout pictures; one layout for all prompts, or one for each."""
    pictures = load_images(placement.layout)
    if len(pictures) not in (1, prompts):
        raise FaceAxesError(
            f"face_layout has {len(pictures)} pictures, but there are {prompts} prompts: give one picture for "
            "each prompt, or one for all"
        )
    found = [
        scale_boxes(pipe._detect_boxes(picture, placement.detector), picture.size, (width, height))
        for picture in pictures
    ]
    rows = max(len(found), len(people))
    boxes = [assign_boxes(found[i % len(found)], people[i % len(people)], placement.assign) for i in range(rows)]
    return [layout_from_boxes(places, height, width, "layout") for places in boxes]


class DraftInterrupted(Exception):
    """The draft was told to stop: `result` is what there is of it."""

    def __init__(self, result: Any) -> None:
        super().__init__("the draft was interrupted")
        self.result = result


def draft_layouts(pipe: Any, placement: Placement, people: list[int], call: Call) -> list[Layout]:
    """Generate without faces, from the same noise, and take the faces found there; one layout for each image.

    The draft is an ordinary call, with the user's callbacks and guidance.

    Raises:
        DraftInterrupted: it was told to stop.
    """
    height, width = pipe._output_size(call.arguments)
    with repeatable_noise(call.arguments):
        result = call.run(output_type="pil", return_dict=True)
    if pipe.interrupt:
        raise DraftInterrupted(result)
    layouts = []
    for index, image in enumerate(result.images):
        count = people[index * len(people) // len(result.images)]
        found = scale_boxes(pipe._detect_boxes(image, placement.detector), image.size, (width, height))
        if len(found) >= count:
            boxes, source = assign_boxes(found, count, placement.assign), "draft"
        else:
            logger.warning(
                "the draft of image %d shows %d faces for %d people: they are placed side by side; give "
                "face_boxes or face_layout for better places",
                *(index, len(found), count),
            )
            assign = placement.assign and [sorted(placement.assign).index(face) for face in placement.assign]
            boxes, source = assign_boxes(even_boxes(count, height, width), count, assign), "even"
        layouts.append(layout_from_boxes(boxes, height, width, source))
    return layouts


def picture_rows(
    pipe: Any, people: list[tuple[Person, ...]], layouts: list[Layout], placement: Placement, call: Call
) -> list[PictureRow]:
    """Who is where in the pictures: one row for all, or one for each prompt or image."""
    height, width = (side // pipe.vae_scale_factor for side in pipe._output_size(call.arguments))
    regions = [
        {
            size: part.to(pipe._execution_device)
            for size, part in layer_regions(
                *(layout.masks, height, width), placement.overlap, placement.background
            ).items()
        }
        for layout in layouts
    ]
    count = max(len(people), len(regions))
    return [
        PictureRow(
            people[i * len(people) // count],
            regions[i * len(regions) // count] if regions else None,
        )
        for i in range(count)
    ]


def with_boxes(result: Any, layouts: list[Layout], images: int) -> Any:
    """The result of a call with `face_boxes` and `face_boxes_source`, where people were placed."""
    if layouts and hasattr(result, "images"):
        of_images = [layouts[i * len(layouts) // images] for i in range(images)]
        sources = [layout.source for layout in of_images]
        result["face_boxes"] = [layout.boxes for layout in of_images]
        result["face_boxes_source"] = sources[0] if len(set(sources)) == 1 else sources
    return result


@contextmanager
def repeatable_noise(arguments: dict[str, Any]) -> Iterator[None]:
    """Generators in `arguments` are put back at the end; where there is none, one is added: a draft has to look like
    the image that is then made of the same noise."""
    if arguments.get("generator") is None:
        arguments["generator"] = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    generators = arguments["generator"]
    generators = generators if isinstance(generators, list) else [generators]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
