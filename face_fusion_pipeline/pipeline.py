"""Stable Diffusion with Face Fusion.

This one folder is a Python package, a diffusers `custom_pipeline` folder and a Hub repository. The loader of diffusers
copies exactly the siblings that this file names, so all that are needed are named here.
"""

from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .face_adapter import FaceFusionAdapter, create_adapter, face_fused_unet
from .face_attention import FaceFusionAttnProcessor
from .face_errors import FaceFusionError
from .face_fusion_mixin import FaceFusionMixin
from .face_identity import FaceIdentity, capture_hidden_states


__all__ = [
    "FaceFusionAdapter",
    "FaceFusionAttnProcessor",
    "FaceFusionError",
    "FaceFusionMixin",
    "FaceIdentity",
    "StableDiffusionFaceFusionPipeline",
    "capture_hidden_states",
    "create_adapter",
    "face_fused_unet",
]


class StableDiffusionFaceFusionPipeline(FaceFusionMixin, StableDiffusionPipeline):
    """Text to image with a person's face, for every Stable Diffusion 1.x or 2.x checkpoint.

    `pipe(prompt, face_image=face)` takes one or several face crops, see [`FaceFusionMixin.__call__`]. Everything else
    is `StableDiffusionPipeline`; unlike it, the VAE may be an `AutoencoderTiny` and the safety checker is optional.

    Example:
        >>> pipe = StableDiffusionFaceFusionPipeline.from_pretrained(base)
        >>> pipe.load_face_fusion_adapter(adapter)
        >>> identity = pipe.encode_face([photo_1, photo_2])
        >>> image = pipe("an astronaut on the moon", face_image=identity).images[0]
    """

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
