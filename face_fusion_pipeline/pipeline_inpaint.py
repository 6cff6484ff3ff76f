"""Face Fusion on diffusers' inpainting pipeline: put a person's face into a picture that is there."""

from typing import Any

from diffusers import StableDiffusionInpaintPipeline

from .face_fusion_mixin import FaceFusionMixin


class StableDiffusionInpaintFaceFusionPipeline(FaceFusionMixin, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` with people's faces, see [`FaceFusionMixin.__call__`]."""

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        height, width = self._default_size()  # diffusers asks the UNet, not the picture, and each side for itself
        return arguments["height"] or height, arguments["width"] or width
