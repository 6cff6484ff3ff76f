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

from .call_arguments import Call
from .conditioner import Conditioner, register_conditioner
from .conditioner_reference import ReferenceConditioner
from .face_adapter import FaceFusionAdapter, create_adapter, face_fused_unet
from .face_attention import FaceFusionAttnProcessor
from .face_axes import face_axes
from .face_defaults import FaceDefaults
from .face_depth import control_depth
from .face_errors import FaceFusionError
from .face_few_steps import few_step_defaults
from .face_files import read_tensors
from .face_fusion_mixin import FaceFusionMixin
from .face_identity import FaceIdentity
from .face_layout import layer_regions
from .face_loader_mixin import FaceLoaderMixin
from .face_ownership import sole_use
from .face_pictures import upright_rgb
from .face_places import place_people
from .face_self_attention import SelfAttentionReference
from .face_single_file import load_single_file
from .face_steps import follow_steps
from .face_text_to_image import TextToImageFaces, one_controlnet
from .guidance_interval import GuidanceInterval
from .joint_attention import joint_attention
from .reference_pass import capture_hidden_states
from .unet_family import base_family


if TYPE_CHECKING:  # not always needed, but the loader has to find their names here
    from .conditioner_face_snap import SnapConditioner
    from .conditioner_face_studio import StudioConditioner
    from .conditioner_tokens import TokenConditioner
    from .control_landmarks import landmark_control
    from .control_pictures import control_picture
    from .face_alignment import align_faces
    from .face_attached import AttachedWeights
    from .face_detectors import load_detector
    from .face_embedders import load_face_embedder
    from .face_familiarity import encode_people
    from .face_file_checks import read_header
    from .face_images import detect_faces
    from .face_landmarkers import load_landmarker
    from .face_landmarks import draw_landmarks
    from .face_metadata import without_metadata
    from .face_models import load_face_model
    from .face_prior import load_prior
    from .face_recognisers import OnnxRecogniser
    from .face_refinement import refine_faces
    from .face_snap import FaceMixer
    from .face_snap_loader_mixin import FaceSnapLoaderMixin
    from .face_studio import FaceStudio
    from .face_studio_loader_mixin import FaceStudioLoaderMixin
    from .face_style import unit_length


__all__ = [
    "Call",
    "Conditioner",
    "FaceDefaults",
    "FaceFusionAdapter",
    "FaceFusionAttnProcessor",
    "FaceFusionError",
    "FaceFusionMixin",
    "FaceIdentity",
    "FaceLoaderMixin",
    "GuidanceInterval",
    "ReferenceConditioner",
    "SelfAttentionReference",
    "StableDiffusionFaceFusionPipeline",
    "TextToImageFaces",
    "base_family",
    "capture_hidden_states",
    "control_depth",
    "create_adapter",
    "face_axes",
    "face_fused_unet",
    "few_step_defaults",
    "follow_steps",
    "joint_attention",
    "layer_regions",
    "load_single_file",
    "place_people",
    "read_tensors",
    "register_conditioner",
    "sole_use",
    "upright_rgb",
]


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
