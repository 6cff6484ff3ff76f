"""A small prior for the CLIP of the avatars: from a caption to the embedding of a picture that it describes.

diffusers' `PriorTransformer` is given a noisy embedding, √ᾱ x + √(1−ᾱ) ε, with the states of CLIP's text tower and its
projected embedding, and predicts the clean one; the loss is the squared error. Embeddings are those that
`image_encoder/` gives, each channel scaled to mean 0 and deviation 1. Some captions are left out, so that the prior
can also be guided. Written are `prior/`, `prior_scheduler/` and how to sample it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from ...face_prior import PRIOR_SETTINGS, PriorPipeline, PriorSettings
from ...files.atomic import write_text
from ...training.latent_cache import cached
from ...training.loop import Batch, Task, TrainingError, digest
from .clip import tokenize
from .data import AvatarImages


SETTINGS = PriorSettings(num_inference_steps=2, guidance_scale=1.0)
TEXT_DROPOUT = 0.1
AT_ONCE = 128  # pictures or captions embedded together
TRIED = 256  # held-out scenes


def create_prior(clip: CLIPModel, width: int, layers: int) -> PriorTransformer:
    """An untrained prior with heads of 32 channels. Raises `TrainingError` for a CLIP of different widths."""
    text, common = clip.config.text_config, clip.config.projection_dim
    if text.hidden_size != common:
        raise TrainingError(
            f"the text tower is {text.hidden_size} wide and the common space {common}: a PriorTransformer takes both "
            "in one width, train a CLIP that has it"
        )
    return PriorTransformer(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=layers,
        embedding_dim=common,
        num_embeddings=text.max_position_embeddings,
        additional_embeddings=4,
    )


def create_scheduler() -> UnCLIPScheduler:
    """1000 steps of cosine noise; the network predicts the embedding itself."""
    return UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample")


@dataclass
class Described:
    """Embeddings of pictures (N, width), and their captions: states (U, L, width), embeddings, which tokens count."""

    images: Tensor
    caption: Tensor  # (N,): which one is whose
    states: Tensor
    texts: Tensor
    words: Tensor  # bool (U, L)


@torch.no_grad()
def describe(clip: CLIPModel, tokenizer: CLIPTokenizer, data: AvatarImages) -> Described:
    """What CLIP makes of all pictures and captions, kept beside the data; the first caption is the empty one."""
    captions = list(dict.fromkeys(["", *data.captions]))
    tokens = tokenize(tokenizer, captions)
    ends = (tokens == tokenizer.eos_token_id).int().argmax(1)
    tokens = tokens[:, : int(ends.max()) + 1]  # of what follows the first end nothing is seen
    key = f"{data.key} {digest(clip.state_dict())}"

    def images() -> Tensor:
        parts = torch.arange(len(data)).split(AT_ONCE)
        found = (clip.vision_model(data.images(part, clip.device)).pooler_output for part in parts)
        return torch.cat([clip.visual_projection(pooled).cpu() for pooled in found])

    def texts() -> Tensor:
        found = (clip.text_model(part.to(clip.device)) for part in tokens.split(AT_ONCE))
        rows = ([one.last_hidden_state, clip.text_projection(one.pooler_output)[:, None]] for one in found)
        return torch.cat([torch.cat(row, 1).half().cpu() for row in rows])

    known = cached(data.folder / "prior_texts.safetensors", key, texts)
    number = {caption: index for index, caption in enumerate(captions)}
    return Described(
        images=cached(data.folder / "prior_images.safetensors", key, images),
        caption=torch.tensor([number[caption] for caption in data.captions]),
        states=known[:, :-1],
        texts=known[:, -1],
        words=torch.arange(tokens.shape[1]) <= ends[:, None],
    )


class PriorTask(Task):
    """Trains `prior` on the embeddings that a frozen CLIP makes of pictures and their captions."""

    name = "prior"

    def __init__(
        self,
        prior: PriorTransformer,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
        train: AvatarImages,
        validation: AvatarImages,
    ) -> None:
        super().__init__()
        clip.requires_grad_(False).eval()
        self.prior, self.scheduler, self.tokenizer = prior, create_scheduler(), tokenizer
        self.text_encoder = CLIPTextModelWithProjection(clip.config.text_config).requires_grad_(False).eval()
        self.text_encoder.load_state_dict(clip.state_dict(), strict=False)
        self.clip_digest = digest(clip.state_dict())
        self.known, self.held_out = (describe(clip, tokenizer, data) for data in (train, validation))
        self.data, self.captions, self.size = train, validation.captions, len(train)
        deviation, mean = torch.std_mean(self.known.images, dim=0, keepdim=True)
        for parameter, value in ((prior.clip_mean, mean), (prior.clip_std, deviation.clamp_min(1e-4))):
            parameter.requires_grad_(False).copy_(value)

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.data.key, "clip": self.clip_digest}

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        device = self.prior.device
        draws = torch.rand(2, len(indices), generator=generator, device=generator.device).cpu()
        caption = torch.where(draws[0] < TEXT_DROPOUT, 0, self.known.caption[indices])
        words = self.known.words[caption]
        longest = int(words.sum(1).max())
        clean = (self.known.images[indices].to(device) - self.prior.clip_mean) / self.prior.clip_std
        return {
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=generator, device=generator.device).to(device),
            "timesteps": (draws[1] * len(self.scheduler.alphas_cumprod)).long().to(device),
            "states": self.known.states[caption, :longest].to(device).float(),
            "texts": self.known.texts[caption].to(device).float(),
            "words": words[:, :longest].to(device),
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        alphas = self.scheduler.alphas_cumprod.to(batch["clean"])[batch["timesteps"]][:, None]
        noisy = alphas.sqrt() * batch["clean"] + (1 - alphas).sqrt() * batch["noise"]
        # Padding is seen by nobody: left out, it takes no time.
        tokens, padded = batch["states"].shape[1], self.prior.positional_embedding.shape[1]
        kept = torch.tensor([*range(tokens), *range(padded - self.prior.additional_embeddings, padded)])
        shorter = {
            "positional_embedding": self.prior.positional_embedding[:, kept],
            "causal_attention_mask": self.prior.causal_attention_mask[:, kept][:, :, kept],
        }
        conditions = (batch["timesteps"], batch["texts"], batch["states"], batch["words"])
        predicted = functional_call(self.prior, shorter, (noisy, *conditions)).predicted_image_embedding
        error = (predicted.float() - batch["clean"]).square().mean(1)
        return error.mean(), {"error_from_noise": error[alphas[:, 0] < 0.1].mean()}

    @property
    def pipeline(self) -> PriorPipeline:
        """The prior as it is used."""
        return PriorPipeline(self.prior, self.text_encoder, self.tokenizer, self.scheduler)

    def sample(self, path: Path) -> dict[str, float]:
        """How well embeddings of held-out scenes are told from their captions, see [`agreement`]."""
        count = min(TRIED, len(self.captions))
        found = self.pipeline(
            self.captions[:count],
            num_inference_steps=SETTINGS.num_inference_steps,
            guidance_scale=SETTINGS.guidance_scale,
            generator=torch.Generator().manual_seed(0),
        )
        true = self.held_out.images[:count]
        figures = agreement(found.image_embeds.float().cpu(), true, self.prior.clip_mean.cpu(), self.captions[:count])
        return {f"validation_{name}": value for name, value in figures.items()}

    def export(self, folder: Path) -> None:
        copy.deepcopy(self.prior).cpu().half().save_pretrained(folder / "prior")
        self.scheduler.save_pretrained(folder / "prior_scheduler")
        write_text(folder / "prior" / PRIOR_SETTINGS, SETTINGS.to_json())


def agreement(predicted: Tensor, true: Tensor, mean: Tensor, captions: list[str]) -> dict[str, float]:
    """How predicted embeddings (n, width) agree with those of the pictures that the captions are of.

    `cosine`: mean cosine, beside that of the `mean` embedding and of another scene's prediction; `centred_cosine`: the
    same after the mean was taken off both; `found`: share of pictures that are nearest to their own caption's.
    """
    off = predicted - mean, true - mean
    nearest = (F.normalize(off[1], dim=-1) @ F.normalize(off[0], dim=-1).T).argmax(1).tolist()
    return {
        "cosine": float(F.cosine_similarity(predicted, true).mean()),
        "cosine_of_mean": float(F.cosine_similarity(mean, true).mean()),
        "cosine_of_another": float(F.cosine_similarity(predicted.roll(1, 0), true).mean()),
        "centred_cosine": float(F.cosine_similarity(*off).mean()),
        "found": sum(captions[row] == captions[place] for row, place in enumerate(nearest)) / len(captions),
    }
