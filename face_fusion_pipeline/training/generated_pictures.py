"""Pictures that the frozen checkpoint draws in batches: latents as they were drawn, and what they look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..guidance_interval import GuidanceInterval
from .base_model import BaseModel, quiet
from .sources import DataError


PIXELS = 2**20  # that the VAE decodes together


@dataclass(frozen=True)
class Drawing:
    """How pictures are denoised. `guidance` is not said to a UNet that is told it otherwise (`time_cond_proj_dim`).

    Attributes:
        low_noise_guidance: guidance in the low-noise half of the timesteps; None: as before.
        batch_size: pictures denoised together; what is drawn does not depend on it but for rounding.
        negative: a negative prompt, which only guidance listens to.
    """

    steps: int = 25
    guidance: float = 5.0
    low_noise_guidance: float | None = None
    batch_size: int = 8
    negative: str = ""


@dataclass(frozen=True)
class Wanted:
    """A picture to draw: `seed` is of its noise, `like` the crop of a face that it is to show."""

    prompt: str
    seed: int
    like: Image.Image | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Drawn:
    """A picture, and its scaled latents as they were drawn, (c, h, w) on the CPU."""

    image: Image.Image
    latents: Tensor


class Artist:
    """Draws with the checkpoint alone; a face to show is seen without training, and by `adapter` (a path) too."""

    def __init__(self, base: BaseModel, drawing: Drawing, adapter: str | None = None) -> None:
        self.base, self.drawing = base, drawing
        self.mode = "training-free" if adapter is None else "both"
        if adapter is not None:
            base.pipeline.load_face_fusion_adapter(adapter)

    @torch.inference_mode()
    def draw(self, wanted: Sequence[Wanted]) -> Iterator[list[Drawn | None]]:
        """Batch by batch; None stands for a picture that is no numbers.

        All have a face to show, or none has. Neighbours with the same face (one object) look at it once.

        Raises:
            DataError: the device has too little memory.
        """
        size, looks = self.drawing.batch_size, dict[int, Any]()
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            try:
                for one in batch:
                    if one.like is not None and id(one.like) not in looks:
                        looks[id(one.like)] = self._identity(one.like)
                looks = {key: looks[key] for key in {id(one.like) for one in batch if one.like is not None}}
                yield self._batch(batch, [[looks[id(one.like)]] for one in batch] if looks else None)
            except torch.OutOfMemoryError as error:
                raise DataError(
                    f"too little memory to draw {len(batch)} pictures together: the same command goes on with a "
                    f"smaller --batch-size than {size}"
                ) from error

    def _identity(self, face: Image.Image) -> Any:
        return self.base.pipeline.encode_face(face, face_mode=self.mode, mirrored=False)

    def _batch(self, wanted: Sequence[Wanted], faces: list[list[Any]] | None) -> list[Drawn | None]:
        drawing, pipe = self.drawing, self.base.pipeline
        more: dict[str, Any] = {} if faces is None else {"face_image": faces}
        if pipe.unet.config.time_cond_proj_dim is None:
            more["guidance_scale"] = drawing.guidance
        if drawing.low_noise_guidance is not None:
            more["callback_on_step_end"] = GuidanceInterval(drawing.low_noise_guidance)
        if drawing.negative and drawing.guidance > 1:
            more["negative_prompt"] = [drawing.negative] * len(wanted)
        with quiet():  # of long prompts the end is cut, which is said once for each otherwise
            latents = pipe(
                [one.prompt for one in wanted],
                num_inference_steps=drawing.steps,
                generator=[torch.Generator().manual_seed(one.seed) for one in wanted],  # on the CPU: alike everywhere
                output_type="latent",
                **more,
            ).images
        pixels = self._pixels(latents)
        finite = (latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)).tolist()
        arrays = pixels.nan_to_num().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [
            Drawn(Image.fromarray(array), one.cpu()) if well else None
            for array, one, well in zip(arrays, latents.half(), finite, strict=True)
        ]

    def _pixels(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), whole numbers from 0 to 255: a few at a time, for a VAE takes far more memory."""
        at_once = max(1, PIXELS // self.base.resolution**2)
        parts = [self.base.decode(latents[start : start + at_once]) for start in range(0, len(latents), at_once)]
        return torch.cat(parts).clamp(0, 1).mul(255).round()
