"""Who uses a UNet: one call with faces at a time, whose attention processors act in its own thread only.

Faces live in the attention layers of a UNet while it runs. A second use with faces would mix identities, so it is
refused. A plain call in another thread, perhaps by a stock pipeline that asks nobody, passes through to the processors
that stood there before.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from .face_errors import FaceFusionError


IN_USE = (
    "this UNet is in use by another call with faces: let calls on one UNet follow each other, do not start one in a "
    "callback of another, or give each thread a UNet of its own"
)

_in_use: WeakSet[Any] = WeakSet()
_lock = threading.Lock()


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


@contextmanager
def sole_use(unet: Any) -> Iterator[None]:
    """Within the block nobody else may put faces into this UNet or take some from it.

    Raises:
        FaceFusionError: at once, if somebody does so already, in this or in another thread.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
    with _lock:
        if unet in _in_use:
            raise FaceFusionError(IN_USE)
        _in_use.add(unet)
    try:
        yield
    finally:
        with _lock:
            _in_use.discard(unet)
