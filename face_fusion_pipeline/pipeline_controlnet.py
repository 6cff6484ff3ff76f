"""Face Fusion on diffusers' ControlNet pipeline, and the way from our text-to-image pipeline to it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionControlNetPipeline
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from torch import Tensor

from .call_arguments import prompt_count
from .control_pictures import ControlFaces, control_inputs, control_rows, load_depth_estimator
from .face_errors import FaceAxesError, FaceFusionError
from .face_fusion_mixin import FaceFusionMixin
from .face_layout import Box, Layout
from .face_models import load_face_model
from .face_ownership import own_thread
from .face_people import check_scale, face_axes
from .face_places import Placement
from .face_snap import as_component, networks_of


if TYPE_CHECKING:  # diffusers' loader copies the siblings that a file names, and no others
    from .conditioner import Conditioner
    from .conditioner_face_snap import SnapConditioner
    from .conditioner_face_studio import StudioConditioner
    from .conditioner_reference import ReferenceConditioner
    from .conditioner_tokens import TokenConditioner
    from .control_landmarks import landmark_control
    from .face_adapter import FaceFusionAdapter
    from .face_attached import AttachedWeights
    from .face_attention import FaceFusionAttnProcessor
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
    from .face_pictures import upright_rgb
    from .face_prior import load_prior
    from .face_recognisers import OnnxRecogniser
    from .face_self_attention import SelfAttentionReference
    from .face_single_file import load_single_file
    from .face_snap_loader_mixin import FaceSnapLoaderMixin
    from .face_studio import FaceStudio
    from .face_studio_loader_mixin import FaceStudioLoaderMixin
    from .face_style import unit_length
    from .guidance_interval import GuidanceInterval
    from .joint_attention import joint_attention
    from .reference_pass import capture_hidden_states
    from .unet_family import base_family


logger = logging.getLogger(__name__)


class ControlNetFaces(FaceFusionMixin):
    """Faces for a ControlNet pipeline, whose ControlNet may be weaker inside them.

    Besides what [`FaceFusionMixin.__call__`] takes, `control_face_scale` in [0, 100] multiplies the ControlNet's
    output inside the face boxes (given, or found as for several people): where a pose image shows another head, a
    strong ControlNet pulls the face towards it.
    """

    control_image_processor: Any
    controlnet: Any

    def __call__(self, prompt: Any = None, *args: Any, control_face_scale: float = 1.0, **kwargs: Any) -> Any:
        self._control_face_scale = check_scale(control_face_scale, "control_face_scale")
        if self._control_face_scale != 1.0 and kwargs.get("face_image") is None:
            logger.warning("control_face_scale=%g does nothing without a face_image", self._control_face_scale)
        try:
            return super().__call__(prompt, *args, **kwargs)
        finally:
            del self._control_face_scale

    @property
    def _token_network(self) -> Any:
        return self.face_snap_network

    def _needs_layout(self) -> bool:
        return self._control_face_scale != 1.0

    def _output_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        image = arguments["image"]
        if image is None:  # diffusers says so in a moment
            return super()._output_size(arguments)
        while isinstance(image, list) and image:
            image = image[0]
        image = image[None] if getattr(image, "ndim", 4) == 3 else image  # the processor looks for a batch
        found = self.control_image_processor.get_default_height_width(image, arguments["height"], arguments["width"])
        return int(found[0]), int(found[1])

    @contextmanager
    def _layouts_applied(self, layouts: list[Layout], images: int) -> Iterator[None]:
        if self._control_face_scale == 1.0 or not layouts:
            yield
            return
        faces = torch.stack([layouts[i * len(layouts) // images].masks.any(0) for i in range(images)])
        strength = 1 - (1 - self._control_face_scale) * faces[:, None].float().to(self._execution_device)

        thread = own_thread()

        def weaken(module: Any, args: Any, output: Any) -> tuple[list[Tensor], Tensor] | None:
            if not thread.here:  # another pipeline's call of the same ControlNet
                return None
            down, middle = output[0], output[1]
            return [at_size(x, strength) for x in down], at_size(middle, strength)

        handle = self.controlnet.register_forward_hook(weaken)
        try:
            yield
        finally:
            handle.remove()


class StableDiffusionControlNetFaceFusionPipeline(ControlNetFaces, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` with people's faces, see [`ControlNetFaces`]."""


def at_size(features: Tensor, strength: Tensor) -> Tensor:
    """Features `(B, C, h, w)` times the map `(images, 1, H, W)`, averaged to their size; B is a multiple of images."""
    mean = F.adaptive_avg_pool2d(strength, (features.shape[-2], features.shape[-1]))
    return features * mean.repeat(len(features) // len(mean), 1, 1, 1).to(features.dtype)


def call_with_control(
    pipe: Any,
    pipeline_class: type,
    prompt: Any,
    control_image: Any,
    control_kind: Any = "auto",
    depth_estimator: Any = "auto",
    control_source: Any = None,
    face_model: Any = None,
    driver_image: Any = None,
    **kwargs: Any,
) -> Any:
    """Generate with the components of `pipe` through the ControlNet pipeline.

    Args:
        pipe: a Face Fusion pipeline with a `controlnet`.
        pipeline_class: that pipeline, of the same family.
        control_image: depth map, photo, driver or other map, nested as diffusers takes it: one for all prompts or a
            list with one for each; of several ControlNets a list with one for each, or prompts × ControlNets. Several
            people are looked for in the photos, in that of each prompt its own, unless their places are given
            otherwise.
        control_kind: what the images are, see `control_pictures`; one, or one for each ControlNet.
        depth_estimator: see `control_pictures.load_depth_estimator`.
        control_source, face_model: of the kind `"landmarks"`, see `face_text_to_image.TextToImageFaces.__call__`.
        driver_image: for FaceSnap's ControlNet, see there, too.

    Raises:
        FaceFusionError: no ControlNet, or an image that fits none.
    """
    prompts = prompt_count({"prompt": prompt, **kwargs})
    controlnet, control_image, control_kind = networks_of_call(
        pipe, control_image, control_kind, driver_image, prompts
    )
    net = getattr(controlnet, "_orig_mod", controlnet)  # torch.compile's wrapper
    nets = len(net.nets) if isinstance(net, MultiControlNetModel) else None
    face_model = getattr(pipe, "face_model", None) if face_model is None else face_model
    tools = ControlFaces(
        size=(kwargs["width"], kwargs["height"]) if kwargs.get("width") and kwargs.get("height") else None,
        default_size=pipe._default_size()[::-1],
        assign=kwargs.get("face_assign"),
        detect=lambda photo: pipe._detect_boxes(photo, kwargs.get("face_detector", "auto")),
        face_model=lambda: pipe._kept("face model", face_model, load_face_model),
        depth_estimator=lambda: pipe._kept("depth estimator", depth_estimator, load_depth_estimator),
    )
    people = people_of_call(tools, kwargs, control_source, prompts)
    image, layout, boxes = control_inputs(control_image, control_kind, people, nets, prompts)
    if all(kwargs.get(name) is None for name in ("face_boxes", "face_masks", "face_layout")):
        groups = [] if kwargs.get("face_image") is None else face_axes(kwargs["face_image"], None)
        if any(len(group) > 1 for group in groups) or (groups and kwargs.get("control_face_scale", 1.0) != 1.0):
            if boxes is None:
                kwargs["face_layout"] = layout
            else:
                kwargs["face_boxes"] = boxes
                kwargs.pop("face_assign", None)  # it chose among the driver's faces

    return pipe.as_pipeline(pipeline_class, controlnet=controlnet)(prompt, image=image, **kwargs)


def networks_of_call(
    pipe: Any, control_image: Any, control_kind: Any, driver_image: Any, prompts: int
) -> tuple[Any, Any, Any]:
    """The ControlNets that take part in a call, their images and kinds: FaceSnap's where there is a driver.

    Raises:
        FaceFusionError: no ControlNet for what is given. FaceAxesError: images that do not go with the prompts.
    """
    own = pipe.face_snap_network
    if own is not None and (hook := getattr(pipe.controlnet, "_hf_hook", None)) is not None:
        hook.pre_forward(pipe.controlnet)  # offloaded together, they are called one by one
    others = [net for net in networks_of(pipe.controlnet) if net is not own]
    if control_image is not None and not others:
        raise FaceFusionError(
            "control_image needs a ControlNet: load the pipeline with controlnet=ControlNetModel..."
            + ("; FaceSnap's own takes a driver_image" if own is not None else "")
        )
    if driver_image is None:
        return (pipe.controlnet if own is None else as_component(others)), control_image, control_kind
    if own is None:
        raise FaceFusionError("driver_image needs FaceSnap's ControlNet: call `load_face_snap(...)` first")
    if control_image is None:
        return own, driver_image, "landmarks"
    images, drivers = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (control_image, driver_image))
    nested = any(isinstance(row, (list, tuple)) for row in images)
    rows = control_rows(images, nested, len(others) if len(others) > 1 else None, prompts)
    driven = control_rows(drivers, False, None, prompts)
    kinds = list(control_kind) if isinstance(control_kind, (list, tuple)) else [control_kind] * len(others)
    count = max(len(rows), len(driven))
    together = [[*rows[i % len(rows)], *driven[i % len(driven)]] for i in range(count)]
    return as_component([*others, own]), together, [*kinds, "landmarks"]


def people_of_call(tools: ControlFaces, kwargs: dict[str, Any], source: Any, prompts: int) -> list[ControlFaces]:
    """Who is drawn where, for all prompts or for each: by the `face_image` and `face_boxes` of a call.

    Args:
        source: whose shapes are drawn in the place of those of `face_image`, nested as it is.

    Raises:
        FaceAxesError, InvalidLayoutError: people or boxes that do not go with the prompts.
    """
    given = kwargs.get("face_image") if source is None else source
    groups = [] if given is None else face_axes(given, prompts)
    placed = kwargs.get("face_boxes")
    boxes = [] if placed is None else Placement(boxes=placed).per_prompt()
    return [
        replace(
            tools,
            people=tuple(groups[row % len(groups)]) if groups else (),
            boxes=boxes[row % len(boxes)] if boxes else None,
        )
        for row in range(max(len(groups), len(boxes), 1))
    ]
