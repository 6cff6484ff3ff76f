"""Stable Diffusion XL with faces as blocks of Modular Diffusers.

`ModularPipeline.from_pretrained(FOLDER, trust_remote_code=True)` finds them by `modular_config.json`. They are
diffusers' own, but for the denoising: with a `face_image` it runs under [`FaceFusionMixin`], as the pipelines do.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.modular_pipelines import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLCoreDenoiseStep,
)

from .call_arguments import Call
from .face_adapter import FaceFusionAdapter
from .face_attention import FaceCall
from .face_errors import FaceFusionError
from .face_fusion_mixin import FaceFusionMixin
from .face_layout import Layout
from .face_ownership import own_thread
from .face_places import Placement


if TYPE_CHECKING:  # diffusers' loader copies the siblings that a file names, and no others
    from .conditioner import Conditioner
    from .conditioner_face_snap import SnapConditioner
    from .conditioner_face_studio import StudioConditioner
    from .conditioner_reference import ReferenceConditioner
    from .conditioner_tokens import TokenConditioner
    from .control_landmarks import landmark_control
    from .control_pictures import control_picture
    from .face_attached import AttachedWeights
    from .face_defaults import FaceDefaults
    from .face_detectors import load_detector
    from .face_embedders import load_face_embedder
    from .face_familiarity import Familiarity
    from .face_files import read_tensors
    from .face_identity import FaceIdentity
    from .face_images import detect_faces
    from .face_landmarkers import load_landmarker
    from .face_landmarks import draw_landmarks
    from .face_loader_mixin import FaceLoaderMixin
    from .face_metadata import without_metadata
    from .face_models import load_face_model
    from .face_people import face_axes
    from .face_pictures import upright_rgb
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


FACE_INPUTS = (
    "face_adapter",
    *(name for name in inspect.signature(FaceFusionMixin.__call__).parameters if name.startswith("face_")),
)
SEE = "Of people: see `FaceFusionMixin.__call__` and, for weights, `load_face_fusion_adapter`."
SIZES = ("height", "width", "num_images_per_prompt", "latents", "prompt_embeds", "cross_attention_kwargs")


class DenoisingBlocks:
    """The denoising of a modular pipeline in the place of the pipeline below `FaceFusionMixin`."""

    blocks: Any
    modular: Any
    state: Any

    def __call__(
        self,
        prompt: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the blocks; the arguments are in the state already, and say here what the faces have to know."""
        return self.blocks(self.modular, self.state)


class ModularFaces(FaceFusionMixin, DenoisingBlocks, StableDiffusionXLPipeline):
    """People for the denoising blocks of a modular pipeline, on its models."""

    def _layouts(self, placement: Placement, people: list[int], call: Call) -> list[Layout]:
        if placement.given is None and max(people) > 1:
            raise FaceFusionError("a modular pipeline makes no draft: give face_boxes, face_masks or face_layout")
        return super()._layouts(placement, people, call)

    def _follow_steps(self, call: Call, start: float, end: float) -> FaceCall:
        self._face_call = FaceCall(("conditional",), call.images, active=start == 0, thread=own_thread())
        self._window = start, end
        return self._face_call

    @contextmanager
    def _layouts_applied(self, layouts: list[Layout], images: int) -> Iterator[None]:
        """A guider lets the UNet run once for each kind of rows, and knows which one it is at."""
        state, guider, (start, end) = self._face_call, self.modular.guider, self._window

        def before(unet: Any, args: Any) -> None:
            state.roles = ("conditional",) if guider.is_conditional else ("unconditional",)
            state.active = start <= guider._step / guider._num_inference_steps < end

        handle = self.unet.register_forward_pre_hook(before)
        try:
            with super()._layouts_applied(layouts, images):
                yield
        finally:
            handle.remove()


class FaceDenoiseStep(StableDiffusionXLCoreDenoiseStep):
    """`StableDiffusionXLCoreDenoiseStep` whose UNet sees faces where a `face_image` is given."""

    @property
    def inputs(self) -> list[Any]:
        return [*super().inputs, *(InputParam(name, description=SEE) for name in FACE_INPUTS)]

    @torch.no_grad()
    def __call__(self, pipeline: Any, state: Any) -> Any:
        given = {name: value for name in FACE_INPUTS if (value := state.get(name)) is not None}
        adapter = given.pop("face_adapter", None)
        if "face_image" not in given:
            return super().__call__(pipeline, state)
        parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
        faces = ModularFaces(**{name: getattr(pipeline, name) for name in parts}, add_watermarker=False)
        faces.blocks, faces.modular, faces.state = super().__call__, pipeline, state
        if isinstance(adapter, torch.nn.Module):  # of whichever copy of this package
            faces.set_face_fusion_adapter(adapter)  # type: ignore[arg-type]
        elif adapter is not None:
            faces.load_face_fusion_adapter(adapter)
        sizes = {name: value for name in SIZES if (value := state.get(name)) is not None}
        if "latents" not in sizes and state.get("image_latents") is not None:
            sizes["latents"] = state.get("image_latents")
        return faces(**sizes, **given)


class FaceFusionBlocks(StableDiffusionXLAutoBlocks):
    """diffusers' blocks of Stable Diffusion XL for all tasks, with faces: trigger `face_image`."""

    block_classes = [
        FaceDenoiseStep if issubclass(block, StableDiffusionXLCoreDenoiseStep) else block
        for block in StableDiffusionXLAutoBlocks.block_classes
    ]
