"""Face Fusion on diffusers' ControlNet pipeline, and the way from our text-to-image pipeline to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

from .face_axes import face_axes
from .face_depth import control_depth, is_depth_map
from .face_errors import FaceFusionError
from .face_fusion_mixin import FaceFusionMixin
from .face_layout import Layout
from .face_loader_mixin import check_scale


class StableDiffusionControlNetFaceFusionPipeline(FaceFusionMixin, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` with people's faces, and with a ControlNet that may be weaker inside them.

    Besides what [`FaceFusionMixin.__call__`] takes, `control_face_scale` in [0, 100] multiplies the ControlNet's
    output inside the face boxes (given, or found as for several people): where a pose image shows another head, a
    strong ControlNet pulls the face towards it.
    """

    def __call__(self, prompt: Any = None, *args: Any, control_face_scale: float = 1.0, **kwargs: Any) -> Any:
        self._control_face_scale = check_scale(control_face_scale, "control_face_scale")
        try:
            return super().__call__(prompt, *args, **kwargs)
        finally:
            del self._control_face_scale

    def _needs_layout(self) -> bool:
        return self._control_face_scale != 1.0

    @contextmanager
    def _layouts_applied(self, layouts: list[Layout], images: int) -> Iterator[None]:
        if self._control_face_scale == 1.0 or not layouts:
            yield
            return
        faces = torch.stack([layouts[i * len(layouts) // images].masks.any(0) for i in range(images)])
        strength = 1 - (1 - self._control_face_scale) * faces[:, None].float().to(self._execution_device)

        def weaken(module: Any, args: Any, output: Any) -> tuple[list[Tensor], Tensor]:
            down, middle = output[0], output[1]
            return [at_size(x, strength) for x in down], at_size(middle, strength)

        handle = self.controlnet.register_forward_hook(weaken)
        try:
            yield
        finally:
            handle.remove()


def at_size(features: Tensor, strength: Tensor) -> Tensor:
    """Features `(B, C, h, w)` times the map `(images, 1, H, W)`, averaged to their size; B is a multiple of images."""
    mean = F.adaptive_avg_pool2d(strength, (features.shape[-2], features.shape[-1]))
    return features * mean.repeat(len(features) // len(mean), 1, 1, 1).to(features.dtype)


def call_with_control(
    pipe: Any,
    prompt: Any,
    control_image: Any,
    control_kind: Any = "auto",
    depth_estimator: Any = "auto",
    **kwargs: Any,
) -> Any:
    """Generate with the components of `pipe` through the ControlNet pipeline.

    Args:
        pipe: a Face Fusion pipeline with a `controlnet`.
        control_image: depth map or photo, see `face_depth.control_depth`; of several ControlNets one each. Several
            people are looked for in a photo, unless their places are given otherwise.
    """
    if pipe.controlnet is None:
        raise FaceFusionError("control_image needs a ControlNet: load the pipeline with controlnet=ControlNetModel...")
    inner = StableDiffusionControlNetFaceFusionPipeline(
        **{name: part for name, part in pipe.components.items() if name != "requires_safety_checker"},
        requires_safety_checker=pipe.config.requires_safety_checker,
    )
    inner._face_adapter, inner._face_layer_scales = pipe._face_adapter, pipe._face_layer_scales
    inner.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    inner.maybe_free_model_hooks = pipe.maybe_free_model_hooks  # offloading belongs to the outer pipeline
    images = control_image if isinstance(control_image, (list, tuple)) else [control_image]
    places = ("face_boxes", "face_masks", "face_layout")
    photo = isinstance(images[0], Image.Image) and (
        control_kind == "photo" or (control_kind == "auto" and not is_depth_map(images[0]))
    )
    if photo and all(kwargs.get(name) is None for name in places):
        casts = [] if kwargs.get("face_image") is None else face_axes(kwargs["face_image"], None)
        if any(len(cast) > 1 for cast in casts) or kwargs.get("control_face_scale", 1.0) != 1.0:
            kwargs["face_layout"] = images[0]
    depths = [control_depth(image, control_kind, depth_estimator) for image in images]
    return inner(prompt, image=depths if isinstance(control_image, (list, tuple)) else depths[0], **kwargs)
