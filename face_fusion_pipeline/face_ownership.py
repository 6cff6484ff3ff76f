"""Who uses a UNet: one call with faces at a time, whose attention processors are in it and act in its own thread only.

Faces live in the attention layers of a UNet while it runs. A second use with faces would mix identities, so it is
refused. A plain call in another thread, perhaps by a stock pipeline that asks nobody, passes through to the processors
that stood there before.
"""

import contextlib
import inspect
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any
from weakref import ref

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from .face_errors import FaceFusionError


logger = logging.getLogger(__name__)

PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

IN_USE = (
    "this UNet is in use by another call with faces: let calls on one UNet follow each other, do not start one in a "
    "callback of another, or give each thread a UNet of its own"
)
# Functions that wait between two steps; to clear the frame of one that waits would end it.
SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
REPLACED = "replaced_processor"  # the submodule that a processor with weights is while ours stands in for it


class OwnThread(threading.local):
    """`here` is True in the thread that [`own_thread`] was called in, and False in any other.

    An attribute rather than a comparison of thread numbers: `torch.compile` can follow and guard it. Before it could
    (torch 2.11) it took the value of the class for that of the thread, so that one is True: a compiled UNet then shows
    its faces to all threads, rather than to none.
    """

    here: bool = True

    def __init__(self, owner: int) -> None:
        self.here = threading.get_ident() == owner  # called again in every thread that asks


def own_thread() -> OwnThread:
    """A mark of the current thread."""
    return OwnThread(threading.get_ident())


class Use:
    """One use of a UNet, for as long as the function goes on that asks for it here, through `with` blocks or not."""

    def __init__(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (
            frame.f_code.co_flags & SUSPENDED or frame.f_code.co_filename == contextlib.__file__
        ):
            frame = frame.f_back
        self.frame = frame

    @property
    def goes_on(self) -> bool:
        """Whether the function still runs: an interrupt can end it at any place, also where it would say so.

        A frame that runs refuses to be cleared, in whichever thread it is. `sys._current_frames`, which would tell
        too, can stop for ever in Python before 3.12: it allocates under a lock that a collection of garbage wants.
        """
        if self.frame is None:
            return False
        try:
            self.frame.clear()
        except RuntimeError:
            return True
        return False


# Who asked for which UNet, in order. There is no lock: one that an interrupt left locked would stop all other threads.
_uses: list[tuple[ref[Any], Use]] = []


@contextlib.contextmanager
def sole_use(unet: Any) -> Iterator[None]:
    """Within the block nobody else may put faces into this UNet or take some from it.

    What an earlier use has left in the UNet, because an interrupt ended it half-way, is put right first.

    Raises:
        FaceFusionError: at once, if somebody uses it already, in this or in another thread.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
    mine = ref(unet), Use()
    try:
        _uses.append(mine)
        if next(entry for entry in tuple(_uses) if entry[0]() is unet and entry[1].goes_on) is not mine:
            raise FaceFusionError(IN_USE)
        heal(unet)
        yield
    finally:
        for entry in tuple(_uses):
            if entry is mine or entry[0]() is None or not entry[1].goes_on:
                with contextlib.suppress(ValueError):  # another thread was quicker
                    _uses.remove(entry)


def heal(unet: Any) -> None:
    """Put back the processors of a UNet in the place of which some were left whose use an interrupt has ended."""
    for layer in getattr(unet, "_orig_mod", unet).modules():
        processor = getattr(layer, "processor", None)
        use = getattr(processor, "use", None)
        if use is not None and not use.goes_on:
            layer._modules.pop(REPLACED, None)
            layer.set_processor(processor.original)  # type: ignore[union-attr]


# --- Installation ---------------------------------------------------------------------------------------------------


def is_ip_adapter_processor(processor: Any) -> bool:
    """True for processors that add image-prompt attention to the text's, recognised by their weights."""
    return hasattr(processor, "to_k_ip")


def check_replaceable(name: str, processor: Any) -> None:
    """Raise [`FaceFusionError`] unless Face Fusion can stand in for `processor` at layer `name`."""
    if hasattr(processor, "acts_here"):  # ours, perhaps of another copy of this module
        raise FaceFusionError(IN_USE)
    if not isinstance(processor, PLAIN_PROCESSORS) and not is_ip_adapter_processor(processor):
        raise FaceFusionError(
            f"{name} uses {type(processor).__name__}, which Face Fusion cannot be combined with; "
            "unload what installed it, or call `unet.set_attn_processor(AttnProcessor2_0())`"
        )


def check_idle(unet: Any) -> None:
    """Raise [`FaceFusionError`] where a call in this thread would see the faces that another one has in this UNet.

    That is in a callback of a call with faces: in other threads they do not act.
    """
    heal(unet)
    for layer in getattr(unet, "_orig_mod", unet).modules():
        if getattr(getattr(layer, "processor", None), "acts_here", False):
            raise FaceFusionError(IN_USE)


@contextlib.contextmanager
def installed_processors(unet: Any, processors: Mapping[str, Any]) -> Iterator[None]:
    """Put `processors` (by layer name) into the UNet and, whatever happens, put the very same old objects back."""
    unet = getattr(unet, "_orig_mod", unet)
    layers = {name: unet.get_submodule(name) for name in processors}
    originals = {name: layer.processor for name, layer in layers.items()}
    for name, original in originals.items():
        check_replaceable(name, original)
    sliced = [
        isinstance(originals[name], SlicedAttnProcessor) and hasattr(processor, "is_face_fusion_processor")
        for name, processor in processors.items()
    ]
    if any(sliced):
        logger.warning("attention slicing is off in %d layers while they see faces: more memory is used", sum(sliced))
    use = Use()
    try:
        for name, layer in layers.items():
            processors[name].take_over(originals[name])
            processors[name].use = use
            layer.set_processor(processors[name])
            if isinstance(originals[name], torch.nn.Module):  # with weights (IP-Adapter), which move with the UNet
                layer.add_module(REPLACED, originals[name])
        yield
        lost = [name for name, layer in layers.items() if layer.processor is not processors[name]]
    finally:
        for name, layer in layers.items():
            layer._modules.pop(REPLACED, None)
            layer.set_processor(originals[name])
    if lost:
        raise FaceFusionError(
            f"the attention processors of {len(lost)} layers (first: {lost[0]}) were replaced during the call, so the "
            "face was lost; change attention processors before or after a call, not in a callback"
        )
