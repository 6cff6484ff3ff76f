"""Models distilled to few steps, told by their scheduler: what suits a call of theirs that says nothing.

They draw in 1 to 8 steps and have guidance in their weights: more of it, or many steps, burn their pictures. Nothing
here needs torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from .face_defaults import FaceDefaults, read_part


# Schedulers that are for such models alone -> steps that suit them.
DISTILLED = {"LCMScheduler": 8, "TCDScheduler": 4}
# Lightning and Hyper-SD draw with these from the last timestep on; so do other models, but not in FEW steps.
TRAILING = ("EulerDiscreteScheduler", "DDIMScheduler")
FEW = 8


def few_step_defaults(
    scheduler: str, config: Mapping[str, Any], steps: int | None = None, guidance_embedded: bool = False
) -> FaceDefaults | None:
    """Guidance, and steps if none were asked for, of a model with this scheduler; None if it is no distilled one.

    Args:
        scheduler: name of its class.
        config: its configuration.
        steps: those that were asked for. The schedulers of Lightning and Hyper-SD serve other models, too: they are
            taken for them in at most 8 steps.
        guidance_embedded: the UNet is told the guidance (`time_cond_proj_dim`): there is no unconditional row at any
            guidance, and diffusers' own suits it.
    """
    if scheduler in DISTILLED:
        return FaceDefaults(None if guidance_embedded else 1.0, num_inference_steps=DISTILLED[scheduler])
    distilled = (
        scheduler in TRAILING
        and config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type", "epsilon") in ("epsilon", "sample")
        and not config.get("rescale_betas_zero_snr")
    )
    few = isinstance(steps, Integral) and 1 <= steps <= FEW
    return FaceDefaults(1.0) if distilled and few and not guidance_embedded else None


def with_few_steps(own: FaceDefaults | None, few: FaceDefaults | None) -> FaceDefaults | None:
    """What a model recommends itself, and where it does not say, what suits its scheduler."""
    if own is None or few is None:
        return own or few
    found = {
        name: getattr(few, name)
        for name in ("guidance_scale", "num_inference_steps")
        if getattr(own, name) is None and getattr(few, name) is not None
    }
    return replace(own, **found)


def settings_of_pipeline(pipe: Any, steps: int | None = None) -> FaceDefaults | None:
    """What suits a call of a loaded pipeline: its `face_defaults`, and what its scheduler of today says."""
    embedded = getattr(getattr(pipe.unet, "config", None), "time_cond_proj_dim", None) is not None
    few = few_step_defaults(type(pipe.scheduler).__name__, pipe.scheduler.config, steps, embedded)
    return with_few_steps(pipe.face_defaults, few)


def few_steps_beside(model: str, revision: str | None = None, steps: int | None = None) -> FaceDefaults | None:
    """As [`few_step_defaults`], of a folder or Hub id that is not loaded; None where its files cannot be read."""
    scheduler = read_part(model, "scheduler/scheduler_config.json", revision)
    if few_step_defaults(str(scheduler.get("_class_name")), scheduler, steps) is None:
        return None
    embedded = read_part(model, "unet/config.json", revision).get("time_cond_proj_dim") is not None
    return few_step_defaults(str(scheduler["_class_name"]), scheduler, steps, embedded)
