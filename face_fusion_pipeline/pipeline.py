"""Stable Diffusion with Face Fusion.

This one folder is a Python package, a diffusers `custom_pipeline` folder and a Hub repository. The loader of diffusers
copies exactly the siblings that this file names, so all that are needed are named here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .call_arguments import Call
from .conditioner import Conditioner, register_conditioner
from .conditioner_reference import ReferenceConditioner
from .face_adapter import FaceFusionAdapter, create_adapter, face_fused_unet
from .face_attention import FaceFusionAttnProcessor
from .face_axes import face_axes
from .face_checkpoints import load_single_file
from .face_defaults import FaceDefaults
from .face_depth import ControlKind, DepthEstimator
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
from .face_steps import follow_steps
from .joint_attention import joint_attention
from .late_guidance import LateGuidance
from .reference_pass import capture_hidden_states
from .unet_family import base_family


if TYPE_CHECKING:  # not always needed, but the loader has to find their names here
    from .face_detectors import load_detector  # noqa: F401
    from .face_file_checks import read_header  # noqa: F401
    from .face_images import detect_faces  # noqa: F401
    from .face_metadata import without_metadata  # noqa: F401
    from .pipeline_img2img import StableDiffusionImg2ImgFaceFusionPipeline  # noqa: F401


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
    "LateGuidance",
    "ReferenceConditioner",
    "SelfAttentionReference",
    "StableDiffusionFaceFusionPipeline",
    "base_family",
    "capture_hidden_states",
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
        if isinstance(controlnet, (list, tuple)):  # from_pipe gives (None, None) for a component that was not there
            nets = [net for net in controlnet if isinstance(net, ControlNetModel)]
            controlnet = MultiControlNetModel(nets) if nets else None
        self.register_modules(controlnet=controlnet)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        control_image: Any = None,
        control_kind: ControlKind | Sequence[ControlKind] = "auto",
        depth_estimator: str | DepthEstimator = "auto",
        **kwargs: Any,
    ) -> Any:
        """Text to image with people's faces, as [`FaceFusionMixin.__call__`]; and with the depth of a picture.

        Args:
            prompt, args, kwargs: those of `StableDiffusionPipeline` and of [`FaceFusionMixin.__call__`].
            control_image: depth map (near is white) or photo that sets the pose, for the `controlnet`; a list with
                one for each prompt, or of several ControlNets with one for each; see
                `pipeline_controlnet.call_with_control`. Then the arguments of `StableDiffusionControlNetPipeline` are
                known too, `controlnet_conditioning_scale`, `control_guidance_start` and so on, and
                `control_face_scale`: the ControlNet's strength inside the face boxes.
            control_kind: `"depth"`, `"photo"` (its depth is estimated), `"map"` (of any other ControlNet, taken as it
                is), or `"auto"`: without colour depth, with colour a photo. With several ControlNets a list, one each;
                `"auto"` refuses colour there.
            depth_estimator: see `face_depth.load_depth_estimator`.
        """
        if control_image is None:
            return super().__call__(prompt, *args, **kwargs)
        if args:
            raise TypeError("with control_image all arguments after the prompt have to be named")
        from .pipeline_controlnet import call_with_control  # here: diffusers' ControlNet pipeline is slow to import

        return call_with_control(self, prompt, control_image, control_kind, depth_estimator, **kwargs)

    def refine_faces(
        self,
        image: Any,
        prompt: str | Sequence[str],
        *,
        face_image: Any,
        face_boxes: Any = None,
        face_detector: Any = "auto",
        strength: float | None = None,
        **kwargs: Any,
    ) -> list[Image.Image]:
        """Draw the small faces of finished pictures again, larger, and put them back; the rest stays as it is.

        Where a face is small the model has few latent cells for it and its likeness suffers. Faces that would hardly
        be enlarged are left as they are.

        Args:
            image: a picture or a list of pictures, such as `images` of a result.
            prompt: of one person, "a smiling person in a suit", for all people or one for each: only this person is
                to be seen in what is drawn again.
            face_image: the people, as in the call: one person, or `[ada, bob]`; one level deeper, for each picture
                its own.
            face_boxes: XYXY of each person's face in pixels of the picture, or such a list for each picture, such as
                `face_boxes` of a result. Default: the faces that are found, people from left to right.
            face_detector: see `face_detectors.load_detector`.
            strength: share of the steps that is done again: how far a face may depart from the first drawing. Default:
                more for smaller faces, from .48 to .8, see `face_refinement.strength_for`.
            kwargs: of `StableDiffusionImg2ImgPipeline` and [`FaceFusionMixin.__call__`], such as
                `num_inference_steps` and `guidance_scale`; `generator`, `negative_prompt` and `face_scale` may be
                lists with one for each person.

        Returns:
            The pictures, in their size.

        Raises:
            FaceFusionError: a subclass for each kind of bad input.
        """
        from .face_refinement import refine_faces  # here: it brings another pipeline of diffusers

        return refine_faces(self, image, prompt, face_image, face_boxes, face_detector, strength, **kwargs)
