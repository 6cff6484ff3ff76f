"""Where people go in a picture: given, found in a layout picture, found in a draft without faces, or side by side."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .call_arguments import Call
from .conditioner import Person, PictureRow
from .face_errors import FaceAxesError
from .face_layout import (
    Layout,
    Placement,
    assign_boxes,
    even_boxes,
    given_masks,
    layer_regions,
    layout_from_boxes,
    scale_boxes,
)
from .face_pictures import load_images


logger = logging.getLogger(__name__)


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
