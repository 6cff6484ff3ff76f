"""A guidance interval: full guidance at high noise, less of it at low noise.

Classifier-free guidance decides in the steps of high noise what is drawn, the prompt's scene and the person. At low
noise only details are left, and it overstates them: what it adds there is no likeness (see docs/figures.md for
figures). Kynkäänniemi et al., "Applying guidance in a limited interval", 2024, find it of no use at low noise in
pictures of all kinds.
"""

import math
from numbers import Real
from typing import Any

from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config

from .face_errors import InvalidScaleError


class GuidanceInterval(PipelineCallback):
    """A step callback of any Stable Diffusion pipeline: `callback_on_step_end=GuidanceInterval(2.0)`.

    The first step of a call has the call's own `guidance_scale`, and a call without guidance stays without.

    Args:
        guidance_scale: of the steps at low noise, above 1: with 1 or less diffusers would compute other batches.
        below: where low noise begins: at timesteps below this fraction of the scheduler's.

    Raises:
        InvalidScaleError: a scale not above 1, or a fraction that is not from 0 to 1.
    """

    tensor_inputs: list[str] = []

    @register_to_config
    def __init__(self, guidance_scale: float, below: float = 0.5) -> None:
        super().__init__()
        if not (isinstance(guidance_scale, Real) and 1 < guidance_scale < math.inf):
            raise InvalidScaleError(f"guidance at low noise must be a number above 1, got {guidance_scale!r}")
        if not (isinstance(below, Real) and 0 <= below <= 1):
            raise InvalidScaleError(f"the fraction of timesteps at low noise must be from 0 to 1, got {below!r}")

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        steps, scheduler = pipeline.num_timesteps, pipeline.scheduler
        if step_index + 1 < steps and pipeline.do_classifier_free_guidance:
            coming = place(scheduler.timesteps, timesteps, step_index, steps) + 1
            if scheduler.timesteps[coming] < self.config.below * scheduler.config.num_train_timesteps:
                pipeline._guidance_scale = self.config.guidance_scale
        return callback_kwargs


def place(timesteps: Any, timestep: Any, step: int, steps: int) -> int:
    """The index in the scheduler's `timesteps` of the step `step` of `steps`, which is at `timestep`.

    Image-to-image leaves steps out at the start, `denoising_end` of XL at the end, and both may come together.
    """
    for index in (step, len(timesteps) - steps + step):
        if timesteps[index] == timestep:
            return index
    return int((timesteps == timestep).nonzero()[0])
