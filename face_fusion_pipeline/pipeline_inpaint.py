"""Face Fusion on diffusers' inpainting pipeline: put a person's face into a picture that is there."""

from diffusers import StableDiffusionInpaintPipeline

from .face_fusion_mixin import FaceFusionMixin


class StableDiffusionInpaintFaceFusionPipeline(FaceFusionMixin, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` with people's faces, see [`FaceFusionMixin.__call__`]."""
