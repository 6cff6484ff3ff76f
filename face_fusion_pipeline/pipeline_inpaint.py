"""Face Fusion on diffusers' inpainting pipeline: put a person's face into a picture that is there."""

from typing import Any

from diffusers import StableDiffusionInpaintPipeline

from .call_arguments import Call
from .face_errors import InvalidLayoutError
from .face_fusion_mixin import FaceFusionMixin
from .face_layout import Layout, Placement


class StableDiffusionInpaintFaceFusionPipeline(FaceFusionMixin, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` with people's faces, see [`FaceFusionMixin.__call__`]."""

    def _layouts(self, placement: Placement, people: list[int], call: Call) -> list[Layout]:
        placed = placement.given is not None or max(people) > 1
        if placed and call.arguments.get("padding_mask_crop") is not None:
            raise InvalidLayoutError(
                "with padding_mask_crop the UNet sees a part of the picture, in which people cannot be placed: leave "
                "it out, or crop the picture before"
            )
        return super()._layouts(placement, people, call)

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        height, width = self._default_size()  # diffusers asks the UNet, not the picture, and each side for itself
        return arguments["height"] or height, arguments["width"] or width
