"""The text-to-image UNet: v-prediction on cached latents and cached text embeddings.

With a noise level ᾱ drawn for each image, z = √ᾱ x + √(1−ᾱ) ε and v = √ᾱ ε − √(1−ᾱ) x, the loss is
w · m · (v̂ − v)², where w = min(SNR + 1, γ + 1)/(SNR + 1) tames nearly clean images as min-SNR does (and unlike it
leaves the noisy ones, where composition and colours are decided, at full weight), and m raises the latents in face
boxes, which are few and matter most. A weight by position does not move the optimum.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ...training.kernels import plain_attention_on_cpu
from ...training.latent_cache import cached
from ...training.loop import Batch, Task, TrainingError, digest, seeded
from ...training.objective import NoiseSchedule, spread_timesteps, weighted_error
from .clip import equal_caption_ids, run_in_float32, tokenize
from .data import AvatarImages, save_grid
from .text_change import change_text, text_map
from .tokenizer import load_tokenizer


logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

TEXT_DROPOUT = 0.1
SNR_GAMMA = 5.0
AT_ONCE = defaultdict(lambda: 64, cuda=1024)  # captions encoded together, by device
SHARD_SIZE = "15MB"  # of the weights, so that no file in the repository is large


@dataclass
class Frozen:
    """The trained parts that the UNet builds on, in float32."""

    vae: AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    image_encoder: CLIPVisionModelWithProjection | None

    @property
    def subject(self) -> dict[str, str]:
        """What was learned below, see `Task.subject`."""
        return {
            "vae": f"{digest(self.vae.encoder.state_dict())}/{self.vae.config.scaling_factor}",
            "text_encoder": digest(self.text_encoder.state_dict()),
        }

    def pipeline(self, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
        """A Stable Diffusion of these parts; its progress bar is off."""
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=create_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=self.image_encoder,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def to(self, device: torch.device | str) -> Frozen:
        """All parts on `device`."""
        for part in (self.vae, self.text_encoder, self.image_encoder):
            if part is not None:
                nn.Module.to(part, device)
        return self

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents (B, 8, S/8, S/8) of images (B, 3, S, S) in [-1, 1]."""
        return self.vae.encode(images).latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def text_states(self, captions: list[str]) -> Tensor:
        """Text embeddings (N, tokens, width) in float16."""
        tokens = tokenize(self.tokenizer, captions)
        device = self.text_encoder.device
        parts = tokens.split(AT_ONCE[device.type])
        return torch.cat([self.text_encoder(part.to(device))[0].half().cpu() for part in parts])


def load_frozen(folder: Path) -> Frozen:
    """The parts in the model folder; raises `TrainingError` naming the stage that is missing."""
    for part, stage in (("vae", "vae"), ("text_encoder", "clip"), ("tokenizer", "clip")):
        if not (folder / part).is_dir():
            raise TrainingError(f"{folder / part} does not exist: train the stage `{stage}` first")
    vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    image_encoder = None
    if (folder / "image_encoder").is_dir():
        image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32)
    for model in (vae, text_encoder, image_encoder):
        if model is not None:
            model.requires_grad_(False).eval()
    return Frozen(vae, text_encoder, load_tokenizer(folder), image_encoder)


def create_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, rescaled to end in pure noise, so that plain backgrounds get their colour.

    The sampler adds no noise of its own. Ancestral ones correct the errors of a weak network, but lose something of
    the person (`docs/figures.md`).
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def create_unet(
    frozen: Frozen, image_size: int, widths: tuple[int, ...], attention: tuple[bool, ...], head_size: int
) -> UNet2DConditionModel:
    """One ResNet block a level; cross-attention at the levels marked in `attention`, from the finest one down."""
    channels = frozen.vae.config.latent_channels
    return UNet2DConditionModel(
        sample_size=image_size // 8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(attention)),
        cross_attention_dim=frozen.text_encoder.config.hidden_size,
        # diffusers reads this as the number of heads, in spite of its name.
        attention_head_dim=tuple(max(1, width // head_size) for width in widths),
    )


def load_unet(folder: Path) -> UNet2DConditionModel:
    if not (folder / "unet").is_dir():
        raise TrainingError(f"{folder / 'unet'} does not exist: train the stage `unet` first")
    return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)


def load_unet_for(frozen: Frozen, folder: Path, captions: list[str]) -> UNet2DConditionModel:
    """The UNet of the model `folder`, fitted to other frozen parts than it was trained with.

    If the VAE has another number of channels, the first and last convolution are new. If the text encoder is another
    one with the same words, the attention to text is re-expressed by the states of these `captions`.
    """
    unet = load_unet(folder)
    channels = frozen.vae.config.latent_channels
    if unet.config.in_channels != channels:
        fitted = UNet2DConditionModel.from_config({**unet.config, "in_channels": channels, "out_channels": channels})
        unet = with_weights(fitted, unet.state_dict())
    fit_text(unet, frozen, folder, captions)
    return unet


def with_weights(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """`model` with those of `weights` that it has under the same name, in the same shape."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    kept = {name: weight for name, weight in weights.items() if shapes.get(name) == weight.shape}
    model.load_state_dict(kept, strict=False)
    return model


def fit_text(network: nn.Module, frozen: Frozen, folder: Path, captions: list[str]) -> None:
    """Re-express a network's attention to text if the model `folder`, of which it is, has another text encoder.

    The states of these `captions` decide; encoders that do not share their words have nothing to go by.
    """
    former = load_frozen(folder)
    same_words = former.tokenizer.get_vocab() == frozen.tokenizer.get_vocab()
    if same_words and digest(former.text_encoder.state_dict()) != digest(frozen.text_encoder.state_dict()):
        solution, explained = text_map(*(part.text_states(captions).flatten(0, 1) for part in (former, frozen)))
        change_text(network, solution)
        logger.info("another text encoder: R² of its states for the former ones is %.2f", explained)


class LatentData:
    """Latents (N, 8, h, w) and text embeddings of a dataset, computed once and kept beside it."""

    depth: Tensor  # uint8 (N, 1, S, S), for those who set it

    def __init__(self, frozen: Frozen, data: AvatarImages) -> None:
        device = frozen.vae.device
        self.key = data.key

        def encode_images() -> Tensor:
            vae = copy.deepcopy(frozen.vae).to(memory_format=torch.channels_last)  # twice as quick on a CPU
            quick = replace(frozen, vae=vae)
            parts = tqdm(torch.arange(len(data)).split(AT_ONCE[device.type] // 2), desc="latents", unit="batch")
            return torch.cat([quick.latents(data.images(part, device)).half().cpu() for part in parts])

        key = f"{data.key}/{digest(frozen.vae.encoder.state_dict())}/{frozen.vae.config.scaling_factor}"
        self.latents = cached(data.folder / "latents.safetensors", key, encode_images)
        self.caption_ids = equal_caption_ids(data.captions)
        captions = list(dict.fromkeys(data.captions))
        key = f"{data.key}/{digest(frozen.text_encoder.state_dict())}"
        self.text = cached(data.folder / "text.safetensors", key, lambda: frozen.text_states(captions))
        self.empty_text = frozen.text_states([""])
        self.faces = data.face_emphasis(self.latents.shape[-1], data.pixels.shape[-1] // self.latents.shape[-1])

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, indices: Tensor, device: torch.device) -> Batch:
        """Latents, text, empty text and face emphasis of the images `indices` on `device`.

        A GPU takes all of the data at the first call: what it gathers itself costs it next to nothing.
        """
        tensors = ("latents", "text", "caption_ids", "empty_text", "faces")
        if device.type == "cuda" and self.latents.device != device:
            for name in tensors:
                setattr(self, name, getattr(self, name).to(device))
        indices = indices.to(self.latents.device, non_blocking=True)
        return {
            "latents": self.latents[indices].to(device).float(),
            "text": self.text[self.caption_ids[indices]].to(device).float(),
            "empty_text": self.empty_text.to(device).float(),
            "faces": self.faces[indices].to(device),
        }


class DiffusionLoss:
    """Noising and the weighted v-loss of the module's docstring.

    Args:
        face_weight: m in face boxes; twice as much is added to 1 at brows, eyes and mouth.
        timestep_power: see `spread_timesteps`; below 1 the noisy ones come more often.
    """

    def __init__(self, face_weight: float, timestep_power: float = 1.0) -> None:
        self.schedule = NoiseSchedule(create_scheduler().alphas_cumprod, "v_prediction")
        self.face_weight, self.timestep_power = face_weight, timestep_power

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Batch:
        """Noise (B, ...) and timesteps (B,) on the device of `generator`."""
        self.schedule = self.schedule.to(generator.device)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        timesteps = spread_timesteps(shape[0], len(self.schedule), generator, self.timestep_power)
        return {"noise": noise, "timesteps": timesteps}

    def drawn(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with noise and timesteps; one caption in ten is dropped."""
        drawn = self.draw(batch["latents"].shape, generator)
        dropped = torch.rand(len(batch["text"]), generator=generator, device=generator.device) < TEXT_DROPOUT
        return batch | drawn | {"text": torch.where(dropped[:, None, None], batch["empty_text"], batch["text"])}

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(z, v) at the batch's timesteps."""
        given = batch["latents"], batch["noise"], batch["timesteps"]
        return self.schedule.noised(*given), self.schedule.target(*given)

    def per_image(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Weighted squared error (B,)."""
        alpha = self.schedule.alphas[batch["timesteps"]]
        weight = torch.clamp((SNR_GAMMA + 1) * (1 - alpha), max=1.0)  # since 1/(SNR + 1) = 1 − ᾱ
        return weight * weighted_error(predicted, target, batch["faces"], self.face_weight)


class UnetTask(Task):
    """Trains the UNet with one caption in ten dropped for classifier-free guidance."""

    name = "unet"
    data: Any  # `LatentData`, or what else has rows: latents, text and faces of indices
    held_out: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        frozen: Frozen,
        train: AvatarImages,
        validation: AvatarImages,
        face_weight: float = 3.0,
        timestep_power: float = 1.0,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet.requires_grad_(True), frozen.vae, frozen.text_encoder
        self.frozen, self.validation, self.size = frozen, validation, len(train)
        self.data, self.held_out = LatentData(frozen, train), LatentData(frozen, validation)
        self.loss = DiffusionLoss(face_weight, timestep_power)
        self.even_loss = DiffusionLoss(face_weight)  # validation losses stay comparable
        self.settings = {"face_loss_weight": face_weight, "timestep_power": timestep_power}

    @property
    def subject(self) -> dict[str, Any]:
        return {**self.settings, "data": self.data.key, **self.frozen.subject}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device  # of diffusers' property, which looks at all weights, a step has many

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        return self.loss.drawn(self.data.rows(indices, self.device), generator)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        noisy, target = self.loss.noised(batch)
        with plain_attention_on_cpu(noisy):
            predicted = self.unet(noisy, batch["timesteps"], batch["text"]).sample
        return self.loss.per_image(predicted, target, batch).mean(), {}

    def sample(self, path: Path) -> dict[str, float]:
        """Twelve held-out captions with fixed noise; the loss on 128 held-out images with fixed noise."""
        count = min(len(self.validation), 12)
        prompts = [self.validation.captions[i] for i in range(count)]
        pipe = self.frozen.pipeline(self.unet)
        generator = seeded(0, 0, "sample")
        output = pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator, output_type="pt")
        images = output.images * 2 - 1
        save_grid(list(images.split(6 if count == 12 else count)), path)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")
        batch = self.held_out.rows(torch.arange(min(len(self.validation), 128)), self.device)
        batch |= self.even_loss.draw(batch["latents"].shape, seeded(0, 0, "validation", self.device))
        return {"validation_loss": float(self.forward(batch)[0])}

    def export(self, folder: Path) -> None:
        save_pipeline(self.frozen, self.unet, folder)


def save_pipeline(frozen: Frozen, unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the whole `StableDiffusionPipeline` in float16."""
    pipe = copy.deepcopy(frozen.pipeline(unet))
    pipe.to("cpu", torch.float16, silence_dtype_warnings=True).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    run_in_float32(folder)
