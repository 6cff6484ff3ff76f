"""Errors a user can act on. Every message names the bad value and the way out."""

from typing import Any


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


PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


def check_no_pickle(name: str) -> None:
    """Raise [`FaceFusionError`] for weights whose name says that they are a pickle."""
    if name.lower().endswith(PICKLES):
        raise FaceFusionError(
            f"{name} is a pickle, which can run code when it is loaded: take the .safetensors file of this model"
        )
