"""The autoencoder: `AutoencoderTiny`, factor 8, trained on crops, at the end on whole images.

Loss: r(x, x̂) + λ r(x↓, D(z↓)) + 0.01 ((std z − 1)² + mean(z)²), the mean by channel, with
r(x, x̂) = |x − x̂| + 5 (x − x̂)² + ½ |∇x − ∇x̂|. ↓ halves the size: latents that decode to a smaller picture when they
are shrunk hold no noise-like detail, which a diffusion model learns slowly (scale equivariance, arXiv 2502.09509).
Latents get noise of up to a tenth of their standard deviation before decoding, so that the decoder forgives the small
errors of a diffusion model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ...training.loop import Batch, Task
from .data import AvatarImages, save_grid


CROP = 64
WHOLE_IMAGES_FROM = 0.8  # progress
LATENT_NOISE = 0.1
EQUIVARIANCE = 0.5  # λ


def create_vae(
    encoder_width: int, decoder_width: int, blocks: tuple[int, int, int, int], latent_channels: int = 8
) -> AutoencoderTiny:
    """`blocks` residual blocks from full resolution down to an eighth of it."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(encoder_width,) * 4,
        decoder_block_out_channels=(decoder_width,) * 4,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        latent_channels=latent_channels,
    )
    initialise(vae)
    return vae


def initialise(vae: AutoencoderTiny) -> None:
    """He initialisation, and residual branches that start at zero.

    PyTorch's default shrinks the signal from layer to layer in a network without normalisation, so that for hundreds
    of steps nothing is learned.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            nn.init.zeros_(module.conv[-1].weight)
    # The last layers are followed by no ReLU; the decoder's gives [0, 1], of which the middle is a good start.
    for last in (vae.encoder.layers[-1], vae.decoder.layers[-1]):
        nn.init.xavier_normal_(last.weight)
    nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)


class VaeTask(Task):
    """Trains `vae`, or with `decoder_only` its decoder, so that latents made before stay valid."""

    def __init__(
        self,
        vae: AutoencoderTiny,
        train: AvatarImages,
        validation: AvatarImages,
        decoder_only: bool = False,
        latent_noise: float = LATENT_NOISE,
        equivariance: float = EQUIVARIANCE,
    ) -> None:
        super().__init__()
        self.name = "vae-decoder" if decoder_only else "vae"
        self.vae, self.decoder_only = vae, decoder_only
        self.latent_noise, self.equivariance = latent_noise, equivariance
        self.settings = {"latent_noise": latent_noise, "equivariance": equivariance, "decoder_only": decoder_only}
        self.data, self.validation, self.size = train, validation, len(train)
        self.centres = (train.first_boxes[:, :2] + train.first_boxes[:, 2:]) / 2
        vae.requires_grad_(True)
        if decoder_only:
            vae.encoder.requires_grad_(False)

    @property
    def subject(self) -> dict[str, Any]:
        return {**self.settings, "data": self.data.key}

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        """Crops of 64 px, half of them near a face; in the last fifth a quarter as many whole images."""
        whole = self.data.pixels.shape[-1]
        if progress >= WHOLE_IMAGES_FROM or whole <= CROP:
            images = self.data.images(indices[: max(1, len(indices) // 4)], self.device)
        else:
            # The generator lives on the device of the networks, the crops are cut where the pixels are.
            draws = torch.rand(len(indices), 3, generator=generator, device=generator.device).cpu()
            anywhere = draws[:, :2] * (whole - CROP)
            near_face = self.centres[indices] - CROP / 2 + (draws[:, :2] - 0.5) * CROP
            corners = torch.where(draws[:, 2:] < 0.5, anywhere, near_face).round().long().clamp(0, whole - CROP)
            images = self.data.pixels.new_empty(len(indices), 3, CROP, CROP)
            for row, (index, (x, y)) in enumerate(zip(indices.tolist(), corners.tolist(), strict=True)):
                images[row] = self.data.pixels[index, :, y : y + CROP, x : x + CROP]
            images = images.to(self.device).float().div_(127.5).sub_(1)
        if progress < WHOLE_IMAGES_FROM:
            flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
            images = torch.where(flip, images.flip(3), images)
        shape = (len(images), self.vae.config.latent_channels, images.shape[2] // 8, images.shape[3] // 8)
        strength = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) * self.latent_noise
        noise = strength * torch.randn(shape, generator=generator, device=generator.device)
        return {"images": images, "noise": noise}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"]
        latents = self.vae.encoder(images)
        std = latents.float().std()
        decoded = self.vae.decoder(latents + batch["noise"] * std.detach()).float()
        loss, extra = difference(decoded, images), {}
        if self.equivariance:
            smaller = difference(self.vae.decoder(halved(latents)).float(), halved(images))
            loss, extra = loss + self.equivariance * smaller, {"smaller": smaller}
        loss = loss + 0.01 * ((std - 1) ** 2 + latents.float().mean(dim=(0, 2, 3)).square().mean())
        return loss, {"mse": F.mse_loss(decoded, images), "latent_std": std, **extra}

    def sample(self, path: Path) -> dict[str, float]:
        """Top: held-out images; below: their reconstructions."""
        count = min(len(self.validation), 256)
        images = self.validation.images(torch.arange(count), self.device)
        decoded = torch.cat([self.vae.decoder(self.vae.encoder(part)) for part in images.split(32)]).clamp(-1, 1)
        save_grid([images[:8], decoded[:8]], path)
        return {"validation_psnr": float(psnr(decoded, images).mean())}

    def export(self, folder: Path) -> None:
        if not self.decoder_only:
            self.vae.register_to_config(scaling_factor=round(1 / self.latent_std(), 5))
        copy.deepcopy(self.vae).half().cpu().save_pretrained(folder / "vae")

    def latent_std(self) -> float:
        """Root mean square of the latents over at most 1024 training images; scaled latents have 1."""
        chosen = torch.arange(min(len(self.data), 1024))
        squares = [self.vae.encoder(self.data.images(part, self.device)).square().mean() for part in chosen.split(32)]
        return float(torch.stack(squares).mean().sqrt())


def difference(decoded: Tensor, images: Tensor) -> Tensor:
    """r of the module's docstring."""
    return F.l1_loss(decoded, images) + 5 * F.mse_loss(decoded, images) + 0.5 * edge_loss(decoded, images)


def halved(x: Tensor) -> Tensor:
    """Images or latents (B, C, H, W) at half their size, averaged."""
    return F.avg_pool2d(x, 2)


def edge_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical finite differences."""
    error = decoded - images
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) in [-1, 1], a range of 2."""
    return 10 * torch.log10(4 / (decoded - images).float().square().mean(dim=(1, 2, 3)))
