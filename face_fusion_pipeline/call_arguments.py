"""The call of the pipeline below: its arguments by name, what a model recommends of them, its steps and signature."""

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .face_attention import FaceCall
from .face_defaults import settings_of_pipeline
from .face_errors import FaceFusionError, InvalidPromptError
from .face_ownership import own_thread
from .guidance_interval import GuidanceInterval


OLD_CALLBACKS = ("callback", "callback_steps")  # diffusers takes them in **kwargs


@dataclass(frozen=True)
class Call:
    """One call of the pipeline below, ready to run."""

    plain: Callable[..., Any]
    bound: inspect.BoundArguments

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, defaults included; may be changed."""
        return self.bound.arguments

    @property
    def prompts(self) -> int:
        return prompt_count(self.arguments)

    @property
    def images(self) -> int:
        """Number of pictures."""
        return self.prompts * (self.arguments.get("num_images_per_prompt") or 1)

    @property
    def lora_scale(self) -> float | None:
        """Strength of LoRAs in this call alone, or None."""
        return (self.arguments.get("cross_attention_kwargs") or {}).get("scale")

    def run(self, **changed: Any) -> Any:
        """What the pipeline returns."""
        bound = inspect.BoundArguments(self.bound.signature, type(self.arguments)(self.arguments | changed))
        return self.plain(*bound.args, **bound.kwargs)


def bind_call(
    pipe: Any, owner: type, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """The arguments of a call by name, with what suits the model of `pipe` where nothing is given.

    Args:
        owner: the mixin whose `__call__` was called; `plain` is the one after it.

    Raises:
        TypeError: an argument that nobody knows. InvalidPromptError: a prompt that is no text.
    """
    signature, known = plain_signature(type(pipe), owner)
    partial = signature.bind_partial(*args, **kwargs)
    defaults = settings_of_pipeline(pipe, partial.arguments.get("num_inference_steps"))
    kwargs = kwargs | recommended(defaults, partial)
    bound = signature.bind(*args, **kwargs)
    check_names(bound, known, inspect.signature(owner.__call__).parameters)
    bound.apply_defaults()
    prompt = bound.arguments.get("prompt")
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not all(isinstance(text, str) for text in texts) and prompt is not None:
        raise InvalidPromptError(f"the prompt must be text or a list of texts, got {prompt!r}")
    return Call(plain, bound)


def has_call_below(pipeline_class: type, owner: type) -> bool:
    """Whether a class after `owner` can be called: there is a pipeline below the mixin."""
    return any("__call__" in vars(c) for c in pipeline_class.__mro__[pipeline_class.__mro__.index(owner) + 1 :])


def plain_signature(pipeline_class: type, owner: type) -> tuple[inspect.Signature, set[str] | None]:
    """The signature of the first `__call__` after `owner` that names its arguments, and all names known after it.

    The names are None where somebody's class takes any: it knows what it does with them.
    """
    classes = pipeline_class.__mro__[pipeline_class.__mro__.index(owner) + 1 :]
    calls = [(c, inspect.signature(vars(c)["__call__"])) for c in classes if "__call__" in vars(c)]
    named = next((signature for _, signature in calls if "prompt" in signature.parameters), calls[0][1])
    names = {name for _, signature in calls for name in signature.parameters}
    foreign = any(
        parameter.kind is parameter.VAR_KEYWORD and not c.__module__.startswith("diffusers.")
        for c, signature in calls
        for parameter in signature.parameters.values()
    )
    parameters = [parameter for name, parameter in named.parameters.items() if name != "self"]
    return named.replace(parameters=parameters), None if foreign else names


def check_names(bound: inspect.BoundArguments, known: set[str] | None, own: Any) -> None:
    """Raise TypeError for an argument that no pipeline knows: diffusers would pass over it in silence."""
    rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    unknown = [name for name in bound.arguments.get(rest) or {} if name not in OLD_CALLBACKS]
    if unknown and known is not None and (strange := [name for name in unknown if name not in known]):
        name = strange[0]
        if name.startswith("control"):
            raise TypeError(f"{name} goes with a control_image, and there is none")
        near = difflib.get_close_matches(name, [*known, *own], 1)
        raise TypeError(f"unknown argument {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))


def prompt_count(arguments: dict[str, Any]) -> int:
    """Number of prompts in a call."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if prompt is not None or embeds is None else int(embeds.shape[0])


def recommended(defaults: Any, bound: inspect.BoundArguments) -> dict[str, Any]:
    """What a model's `FaceDefaults` recommend of those arguments that `bound` was not given."""
    known, given = bound.signature.parameters, bound.arguments
    if defaults is None:
        return {}
    added = {
        name: getattr(defaults, name)
        for name in ("num_inference_steps", "guidance_scale")
        if name in known and name not in given and getattr(defaults, name) is not None
    }
    later, user = defaults.low_noise_guidance, given.get("callback_on_step_end")
    if later is None or "guidance_scale" not in added or "callback_on_step_end" not in known:
        return added
    if isinstance(user, (PipelineCallback, MultiPipelineCallbacks)):
        return added  # one that may change guidance itself, as `GuidanceInterval` does
    interval = GuidanceInterval(later)
    if user is None:
        return added | {"callback_on_step_end": interval}

    def both(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> Any:
        return user(pipe, step, timestep, interval(pipe, step, timestep, tensors))

    return added | {"callback_on_step_end": both}


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


def with_whole_signature(call: Callable[..., Any], pipeline_class: type, owner: type) -> Callable[..., Any]:
    """`call`, a pipeline's `__call__`, as a function whose signature names all arguments, ours and those below.

    `help`, completion and tools that read signatures then show them; the function does what `call` does.
    """

    @functools.wraps(call)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs)

    below, _ = plain_signature(pipeline_class, owner)
    own = [
        parameter
        for c in pipeline_class.__mro__[: pipeline_class.__mro__.index(owner) + 1]
        if "__call__" in vars(c)
        for parameter in inspect.signature(vars(c)["__call__"]).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    merged = {p.name: p for p in below.parameters.values() if p.kind is not p.VAR_KEYWORD}
    merged |= {p.name: p for p in reversed(own) if p.name not in merged}
    rest = [p for p in below.parameters.values() if p.kind is p.VAR_KEYWORD]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ordered = [p for p in merged.values() if p.kind is not p.KEYWORD_ONLY] + [
        p for p in merged.values() if p.kind is p.KEYWORD_ONLY
    ]
    whole.__signature__ = inspect.Signature([first, *ordered, *rest])  # type: ignore[attr-defined]
    return whole
