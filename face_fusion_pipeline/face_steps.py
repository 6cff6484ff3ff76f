"""The steps of a call: which of them see faces, and which rows of their batches."""

from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .call_arguments import Call
from .face_attention import FaceCall
from .face_errors import FaceFusionError
from .face_ownership import own_thread


def follow_steps(pipe: Any, call: Call, start: float, end: float) -> FaceCall:
    """The state of the first step, kept right by a step callback around the user's, which is put into `call`.

    Plain attributes rather than a look at the pipeline inside the layers: `torch.compile` can follow these.
    """
    arguments = call.arguments
    for name in ("guidance_scale", "pag_scale"):  # what the pipeline itself does first
        if name in arguments:
            setattr(pipe, f"_{name}", arguments[name])
    state = FaceCall(pipe._row_roles(), call.images, active=start == 0, thread=own_thread())
    if "callback_on_step_end" not in arguments:
        if (start, end) != (0, 1):
            raise FaceFusionError("face_start and face_end need a pipeline that takes callback_on_step_end")
        return state
    user = arguments["callback_on_step_end"]
    if isinstance(user, (PipelineCallback, MultiPipelineCallbacks)):
        arguments["callback_on_step_end_tensor_inputs"] = user.tensor_inputs

    def after_step(running: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = tensors if user is None else user(running, step, timestep, tensors)
        state.active = start <= (step + 1) / running.num_timesteps < end
        state.roles = running._row_roles()  # a callback may end guidance half-way
        return tensors

    arguments["callback_on_step_end"] = after_step
    return state
