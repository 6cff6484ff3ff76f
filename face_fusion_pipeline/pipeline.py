"""Stable Diffusion with Face Fusion.

This one folder is a Python package, a diffusers `custom_pipeline` folder and a Hub repository. The loader of diffusers
copies exactly the siblings that this file names, so all that are needed are named here.
"""

from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .face_text_to_image import TextToImageFaces, one_controlnet


if TYPE_CHECKING:  # diffusers' loader copies the siblings that a file names, and no others
    from .call_arguments import Call
    from .conditioner import Conditioner
    from .conditioner_face_snap import SnapConditioner
    from .conditioner_face_studio import StudioConditioner
    from .conditioner_reference import ReferenceConditioner
    from .conditioner_tokens import TokenConditioner
    from .control_landmarks import landmark_control
    from .control_pictures import control_picture
    from .face_adapter import FaceFusionAdapter
    from .face_attached import AttachedWeights
    from .face_attention import FaceFusionAttnProcessor
    from .face_defaults import FaceDefaults
    from .face_detectors import load_detector
    from .face_embedders import load_face_embedder
    from .face_errors import FaceFusionError
    from .face_familiarity import Familiarity
    from .face_files import read_tensors
    from .face_fusion_mixin import FaceFusionMixin
    from .face_identity import FaceIdentity
    from .face_images import detect_faces
    from .face_landmarkers import load_landmarker
    from .face_landmarks import draw_landmarks
    from .face_layout import layer_regions
    from .face_loader_mixin import FaceLoaderMixin
    from .face_metadata import without_metadata
    from .face_models import load_face_model
    from .face_ownership import sole_use
    from .face_people import face_axes
    from .face_pictures import upright_rgb
    from .face_places import place_people
    from .face_prior import load_prior
    from .face_recognisers import OnnxRecogniser
    from .face_refinement import refine_faces
    from .face_self_attention import SelfAttentionReference
    from .face_single_file import load_single_file
    from .face_snap import FaceMixer
    from .face_snap_loader_mixin import FaceSnapLoaderMixin
    from .face_studio import FaceStudio
    from .face_studio_loader_mixin import FaceStudioLoaderMixin
    from .face_style import unit_length
    from .guidance_interval import GuidanceInterval
    from .joint_attention import joint_attention
    from .reference_pass import capture_hidden_states
    from .unet_family import base_family


class StableDiffusionFaceFusionPipeline(TextToImageFaces, StableDiffusionPipeline):
    """Text to image with a person's face, for every Stable Diffusion 1.x or 2.x checkpoint.

    `pipe(prompt, face_image=face)` takes one or several face crops, see [`FaceFusionMixin.__call__`]. Everything else
    is `StableDiffusionPipeline`; unlike it, the VAE may be an `AutoencoderTiny` and the safety checker is optional.

    Example:
        >>> pipe = StableDiffusionFaceFusionPipeline.from_pretrained(base)
        >>> pipe.load_face_fusion_adapter(adapter)
        >>> identity = pipe.encode_face([photo_1, photo_2])
        >>> image = pipe("an astronaut on the moon", face_image=identity).images[0]
    """

    _optional_components = [*StableDiffusionPipeline._optional_components, "controlnet"]

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
        controlnet: ControlNetModel | MultiControlNetModel | None = None,
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
        self.register_modules(controlnet=one_controlnet(controlnet))

    def _control_class(self) -> type:
        from .pipeline_controlnet import StableDiffusionControlNetFaceFusionPipeline

        return StableDiffusionControlNetFaceFusionPipeline

    def _image_to_image_class(self) -> type:
        from .pipeline_img2img import StableDiffusionImg2ImgFaceFusionPipeline

        return StableDiffusionImg2ImgFaceFusionPipeline
