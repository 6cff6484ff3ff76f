"""Stable Diffusion XL with Face Fusion."""

from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

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
    from .pipeline_controlnet import call_with_control
    from .pipeline_img2img import ImageToImageFaces
    from .reference_pass import capture_hidden_states
    from .unet_family import base_family


class StableDiffusionXLFaceFusionPipeline(TextToImageFaces, StableDiffusionXLPipeline):
    """Text to image with a person's face, for every Stable Diffusion XL checkpoint.

    As `StableDiffusionFaceFusionPipeline`; the other arguments of a call are those of `StableDiffusionXLPipeline`. The
    micro-conditioning of a call is of the picture: when it looks at a face, the UNet is told the size of the crop.

    Example:
        >>> pipe = StableDiffusionXLFaceFusionPipeline.from_pretrained(base)
        >>> identity = pipe.encode_face([photo_1, photo_2])
        >>> image = pipe("an astronaut on the moon", prompt_2="watercolor", face_image=identity).images[0]
    """

    _optional_components = [*StableDiffusionXLPipeline._optional_components, "controlnet"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        controlnet: ControlNetModel | MultiControlNetModel | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(controlnet=one_controlnet(controlnet))

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        height, width = super()._output_size(arguments)
        if arguments.get("latents") is None:  # one side alone counts here, unlike with Stable Diffusion 1.x
            height, width = arguments["height"] or height, arguments["width"] or width
        return height, width

    def _control_class(self) -> type:
        from .pipeline_xl_controlnet import StableDiffusionXLControlNetFaceFusionPipeline

        return StableDiffusionXLControlNetFaceFusionPipeline

    def _image_to_image_class(self) -> type:
        from .pipeline_xl_img2img import StableDiffusionXLImg2ImgFaceFusionPipeline

        return StableDiffusionXLImg2ImgFaceFusionPipeline
