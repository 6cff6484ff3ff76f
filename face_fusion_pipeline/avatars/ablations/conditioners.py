"""The conditioner of each variant."""

from __future__ import annotations

from pathlib import Path

from ...training.base_model import BaseModel
from ...training.sources import DataError
from .conditioning import Conditioning
from .encoders import FaceEmbedderEncoder, ImageEncoder, load_conditioner
from .ip_adapter import EncoderTokens
from .unet_features import UNetFeatures
from .variants import Variant


def create_conditioning(base: BaseModel, variant: Variant, data: Path, embedder: str | None = None) -> Conditioning:
    """A new conditioning for `base`; torch's random state decides its random weights.

    Args:
        data: the prepared folder, for crop and resolution of its references.
        embedder: of the variant that takes one, see `encoders.load_conditioner`.

    Raises:
        FaceFusionError: SDXL, or the base has no image encoder.
    """
    if base.is_xl:
        raise DataError(f"{base.name} is a Stable Diffusion XL: ablations are made for 1.x and 2.x")
    if variant.encoder == "unet":
        return UNetFeatures(base, variant, data)
    if variant.encoder == "face embedder":
        return EncoderTokens(base.unet, variant, FaceEmbedderEncoder(load_conditioner(embedder)), data, "embedding")
    model = getattr(base.pipeline, "image_encoder", None)
    patches = variant.encoder == "clip patches"
    encoder = ImageEncoder(model, getattr(base.pipeline, "feature_extractor", None), patches=patches)
    return EncoderTokens(base.unet, variant, encoder, data, "patches" if patches else "image")
