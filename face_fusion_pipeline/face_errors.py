"""Errors and warnings a user can act on. Every message names the bad value and the way out."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast


Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


def shown(value: Any, limit: int = 80) -> str:
    """`repr(value)` as a message shows it: of a long one its beginning."""
    text = repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."


def short(error: object, limit: int = 300) -> str:
    """The words of another error in one line, cut where it repeats what it could not read."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


class FaceFusionError(ValueError):
    """Base of all errors that Face Fusion raises on bad input."""


class UnreadableImageError(FaceFusionError):
    """A file or object that cannot be read as an image."""


class NoFaceError(FaceFusionError):
    """A photo without a face in it."""


class SeveralFacesError(FaceFusionError):
    """A photo with several faces where one is meant."""


class FaceTooSmallError(FaceFusionError):
    """A face with too few pixels to carry an identity."""


class AdapterMismatchError(FaceFusionError):
    """Adapter weights that do not fit this model, this format, or are no adapter at all."""


class IdentityMismatchError(FaceFusionError):
    """A saved identity made with another base model, adapter or mode."""


class InvalidScaleError(FaceFusionError):
    """A strength, reference weight or time window out of range."""


class InvalidPromptError(FaceFusionError):
    """A prompt that is not text."""


class ModelNotFoundError(FaceFusionError):
    """A model or weights file that is not where it was said to be."""


class InvalidLayoutError(FaceFusionError):
    """Face boxes, masks, or their number, that do not fit the image or the people."""


class LandmarksError(FaceFusionError):
    """Facial points, a pose or a face model that cannot be used."""


class FaceAxesError(FaceFusionError):
    """Prompts, people, references or values for them whose numbers do not go together."""


def renamed(values: Mapping[str, Any], names: Mapping[str, str], where: object) -> dict[str, Any]:
    """`values` under the names of today: what goes by an earlier one is kept, with a line of warning.

    Args:
        names: earlier name -> the one of today.
        where: whose values they are, for the warning.

    Raises:
        FaceFusionError: a value under both names.
    """
    for old in [name for name in names if name in values]:
        new = names[old]
        if new in values:
            raise FaceFusionError(f"{where} has {old} and {new}, which are the same: give {new} alone")
        logger.warning("%s: %s is called %s now", where, old, new)
    return {names.get(name, name): value for name, value in values.items()}


def also_named(**names: str) -> Callable[[Function], Function]:
    """A decorator of a function whose arguments may also be given by earlier names, see [`renamed`]."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def taking(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **renamed(kwargs, names, function.__qualname__))

        return cast(Function, taking)

    return decorate


PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


def check_no_pickle(name: str) -> None:
    """Raise [`FaceFusionError`] for weights whose name says that they are a pickle."""
    if name.lower().endswith(PICKLES):
        raise FaceFusionError(
            f"{name} is a pickle, which can run code when it is loaded: take the .safetensors file of this model"
        )
