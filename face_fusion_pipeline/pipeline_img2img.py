"""Face Fusion on diffusers' image-to-image pipeline: the same mixin before another class."""

from diffusers import StableDiffusionImg2ImgPipeline

from .face_fusion_mixin import FaceFusionMixin


class StableDiffusionImg2ImgFaceFusionPipeline(FaceFusionMixin, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` with people's faces, see [`FaceFusionMixin.__call__`]."""
