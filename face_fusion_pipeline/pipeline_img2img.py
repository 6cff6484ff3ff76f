"""Face Fusion on diffusers' image-to-image pipeline: the same mixin before another class."""

from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline

from .face_fusion_mixin import FaceFusionMixin


class StableDiffusionImg2ImgFaceFusionPipeline(FaceFusionMixin, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` with people's faces, see [`FaceFusionMixin.__call__`]."""

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        if arguments["image"] is None:  # diffusers says so in a moment
            return super()._output_size(arguments)
        _, channels, height, width = self.image_processor.preprocess(arguments["image"]).shape
        latents = channels == self.image_processor.config.vae_latent_channels
        scale = self.vae_scale_factor if latents else 1
        return height * scale, width * scale
