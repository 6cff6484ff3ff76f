"""Depth maps for a depth ControlNet: as given, or estimated from a photo by a package that is there."""

import importlib
import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from .face_errors import ModelNotFoundError, UnreadableImageError


logger = logging.getLogger(__name__)

DepthEstimator = Callable[[Image.Image], Any]
ControlKind = Literal["auto", "depth", "photo"]
MIDAS_REPO = "lllyasviel/Annotators"
DEPTH_REPO = "depth-anything/Depth-Anything-V2-Small-hf"
GREY = 2  # a decoded JPEG of a grey image has channels that differ by so much


def is_depth_map(image: Image.Image) -> bool:
    """Whether an image has no colour, as depth maps have none. A grey photo has to be announced as a photo."""
    if image.mode in ("L", "I", "F", "1") or image.mode.startswith("I;16"):
        return True
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    return bool((pixels.max(-1) - pixels.min(-1)).max() <= GREY)


def depth_image(depth: Any) -> Image.Image:
    """Any depth map as the RGB picture that depth ControlNets take: near is white, far is black.

    Args:
        depth: grey image, or array `(H, W)` where larger means nearer (as MiDaS gives), stretched to its range; uint8
            is kept as it is.
    """
    if isinstance(depth, Image.Image):
        if depth.mode in ("RGB", "RGBA", "L", "P"):
            return depth.convert("RGB")
        depth = np.asarray(depth)
    array = np.asarray(depth.detach().cpu() if hasattr(depth, "detach") else depth).squeeze()
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise UnreadableImageError(f"a depth map must be finite numbers of shape (H, W), got {array.shape}")
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        array = np.round((array - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def load_depth_estimator(estimator: str | DepthEstimator = "auto") -> DepthEstimator:
    """A function from an RGB image to a depth map, by name; a function is returned as it is.

    Args:
        estimator: `"midas"` is controlnet-aux' MiDaS, `"auto"` the same where it is installed and Depth Anything
            through transformers otherwise; any other text is a folder or Hub id for transformers.

    Raises:
        ModelNotFoundError: package or weights are missing.
    """
    if callable(estimator):
        return estimator
    if estimator in ("auto", "midas"):
        try:
            detector = importlib.import_module("controlnet_aux").MidasDetector.from_pretrained(MIDAS_REPO)
            logger.info("depth estimator: MiDaS of controlnet-aux")
            return lambda image: detector(image)
        except Exception as error:  # missing package, broken torchvision, no network: many types
            if estimator == "midas":
                raise ModelNotFoundError(
                    f"MiDaS is not at hand ({type(error).__name__}: {error}): "
                    "pip install 'face-fusion-pipeline[depth]', or give a depth map"
                ) from error
    name = DEPTH_REPO if estimator == "auto" else estimator
    try:
        transformers = importlib.import_module("transformers")
        model = transformers.AutoModelForDepthEstimation.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        pipe = transformers.pipeline("depth-estimation", model=model, image_processor=processor)
    except Exception as error:
        raise ModelNotFoundError(
            f"no depth estimator {name!r} ({type(error).__name__}): give a folder with one, a function, or a depth map"
        ) from error
    logger.info("depth estimator: %s", name)
    return lambda image: pipe(image)["predicted_depth"]


def control_depth(image: Any, kind: ControlKind = "auto", estimator: str | DepthEstimator = "auto") -> Image.Image:
    """The RGB depth map for a ControlNet, from a depth map or a photo.

    Args:
        image: PIL image or array.
        kind: what it is; `"auto"` takes a picture without colour for a depth map.
        estimator: for photos, see [`load_depth_estimator`].
    """
    if kind not in ("auto", "depth", "photo"):
        raise ValueError(f"the control kind must be 'auto', 'depth' or 'photo', got {kind!r}")
    picture = image if isinstance(image, Image.Image) else None
    if picture is None and getattr(image, "ndim", 2) == 3 and getattr(image, "dtype", None) == np.uint8:
        picture = Image.fromarray(image)
    if kind == "depth" or picture is None or (kind == "auto" and is_depth_map(picture)):
        return depth_image(image)
    picture = picture.convert("RGB")
    return depth_image(load_depth_estimator(estimator)(picture)).resize(picture.size, Image.Resampling.BICUBIC)
