"""The frozen checkpoint that an adapter is trained for. All that differs between SD 1.x/2.x and SDXL is in here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from ..face_errors import FaceFusionError
from ..generation.loading import check_draws_text, load_checkpoint, model_class, pipeline_for, quietly, unloadable
from ..unet_family import TEXT, encode_latents, latent_scaling, text_conditions, unet_arguments
from .loop import TrainingError
from .objective import NoiseSchedule


@dataclass
class BaseModel:
    """A Stable Diffusion pipeline, frozen, with what training asks of it.

    Attributes:
        name: folder or Hub id that it was loaded from.
        pipeline: the diffusers pipeline with all its parts on one device.
        schedule: its noise levels and what its UNet predicts.
    """

    name: str
    pipeline: Any
    schedule: NoiseSchedule

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Of the UNet, from one weight: diffusers looks at all of them, which takes milliseconds, often in a step."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet."""
        return self.unet.conv_in.weight.dtype

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def is_xl(self) -> bool:
        return isinstance(self.pipeline, StableDiffusionXLPipeline)

    @property
    def text_encoders(self) -> list[Any]:
        found = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [encoder for encoder in found if encoder is not None]

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the UNet was made for."""
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else min(size)) * self.pipeline.vae_scale_factor

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the frozen weights in `dtype`; the VAE of SDXL stays in float32, for it overflows in float16."""
        for part in (self.unet, self.vae, *self.text_encoders):
            keep = part is self.vae and self.is_xl and dtype == torch.float16
            torch.nn.Module.to(part, dtype=torch.float32 if keep else dtype)  # that of diffusers warns of nothing

    @torch.no_grad()
    def conditions(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the UNet is told of N prompts, see `unet_family.text_conditions`."""
        with quiet():  # long captions are cut: as many warnings as captions would help nobody
            return text_conditions(self.pipeline, prompts, self.device)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents of images (B, 3, H, W) in [-1, 1]: the posterior's mode."""
        return encode_latents(self.vae, pixels.to(self.vae.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [0, 1], of scaled latents; gradients pass through."""
        shift, scale = latent_scaling(self.vae, latents)
        latents = latents / scale + shift
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float() / 2 + 0.5

    def unet_arguments(self, conditions: Mapping[str, Tensor], side: int) -> dict[str, Any]:
        """Keyword arguments of the UNet for B rows of `conditions` and square images of `side` pixels, not cropped."""
        return unet_arguments({**conditions, TEXT: conditions[TEXT].to(self.dtype)}, side, side)


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers log errors only."""
    levels = [library.get_verbosity() for library in (diffusers_logging, transformers_logging)]
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip((diffusers_logging, transformers_logging), levels, strict=True):
            library.set_verbosity(level)


@quietly()
def load_base(
    name: str | Path, dtype: torch.dtype = torch.float32, config: str | None = None, **hub: Any
) -> BaseModel:
    """The checkpoint in a diffusers folder, a `.safetensors` file, or of a Hub id, frozen, without safety checker.

    Args:
        config: folder or Hub id with the configuration of a file, see `face_single_file.load_single_file`.
        hub: `revision`, `variant`, `token`, `cache_dir`.

    Raises:
        ModelNotFoundError: it cannot be loaded. TrainingError: another architecture, or without noise levels.
    """
    try:
        kind = model_class(str(name), **{k: v for k, v in hub.items() if k != "variant"})
        if not kind.startswith("StableDiffusion") or kind.startswith("StableDiffusion3"):
            raise TrainingError(f"{name} is a {kind}: Face Fusion can be trained for Stable Diffusion 1.x, 2.x and XL")
        without: dict[str, Any] = {"controlnet": None}
        without |= {} if "XL" in kind else {"safety_checker": None, "requires_safety_checker": False}
        pipeline = load_checkpoint(pipeline_for(kind), str(name), config, dtype=dtype, **without, **hub)
        pipeline.face_defaults = None  # what a training and its samples see is said with every call
        check_draws_text(pipeline, str(name))
    except FaceFusionError:
        raise
    except Exception as error:  # not there, offline, gated, another or a broken model, pickles: any type
        raise unloadable(f"model {name}", error) from error
    pipeline.vae.to(memory_format=torch.channels_last)  # encodes up to twice as fast, on CPUs too
    return base_of(pipeline, str(name))


def base_of(pipeline: Any, name: str = "") -> BaseModel:
    """A loaded pipeline as the base of a training; its parts are frozen."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    try:
        # All values as they are: from_config would put its own defaults for those that are at the other's default.
        config = {key: value for key, value in pipeline.scheduler.config.items() if key != "_use_default_values"}
        noise = DDPMScheduler.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TrainingError(
            f"the noise levels of {type(pipeline.scheduler).__name__} are not known: {error}"
        ) from error
    return BaseModel(name, pipeline, NoiseSchedule(noise.alphas_cumprod, noise.config.prediction_type))
