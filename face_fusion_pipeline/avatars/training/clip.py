"""A small CLIP, trained contrastively. Its text tower conditions the UNet, both towers give CLIP scores.

Captions repeat in a large batch, so all images with the same caption count as its positives:
L = (CE(τ·I Tᵀ, P) + CE(τ·T Iᵀ, P)) / 2 + CE(cos(h, E) / 0.1, words), where P spreads a row's mass evenly over equal
captions, h are the text tower's last hidden states, E its word embeddings. The last term keeps every word readable
where it stands: a small image tower sees no difference between a smile and a frown, so that the contrastive terms
alone let such words collapse into one, and no UNet could tell them apart afterwards.

Exported parts: `text_encoder` (CLIPTextModel, what Stable Diffusion reads), `tokenizer`, `image_encoder`
(CLIPVisionModelWithProjection, an optional component of the pipeline) and, for scores only and outside
`model_index.json`, `clip_score/` (CLIPTextModelWithProjection).
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ...files.atomic import write_text
from ...training.loop import Batch, Task
from .data import AvatarImages


def create_clip(
    tokenizer: CLIPTokenizer,
    image_size: int,
    text_width: int,
    text_layers: int,
    vision_width: int,
    vision_layers: int,
    projection: int,
    patch_size: int = 16,
) -> CLIPModel:
    """A CLIP with heads of 32 channels and MLPs of four times the width."""
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_width // 32,
        "intermediate_size": 4 * text_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": projection,
    }
    vision = {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_width // 32,
        "intermediate_size": 4 * vision_width,
        "projection_dim": projection,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))


PARTS = ("text_encoder", "clip_score", "image_encoder")
WORD_TEMPERATURE = 0.1


class ClipTask(Task):
    """Contrastive training; images are normalised to [-1, 1], without further statistics."""

    name = "clip"

    def __init__(
        self, clip: CLIPModel, tokenizer: CLIPTokenizer, train: AvatarImages, validation: AvatarImages
    ) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.data, self.validation, self.size = train, validation, len(train)
        self.tokens = tokenize(tokenizer, train.captions)
        self.caption_ids = equal_caption_ids(train.captions)

    @property
    def subject(self) -> dict[str, Any]:
        words = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return {"data": self.data.key, "words": hashlib.sha256(words.encode()).hexdigest()[:16]}

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        tokens = self.tokens[indices]
        # Causal attention: what follows the first end token cannot change the caption's embedding.
        longest = int((tokens != self.tokenizer.eos_token_id).sum(dim=1).max()) + 1
        return {
            "images": self.data.images(indices, self.device),
            "tokens": tokens[:, :longest].to(self.device),
            "captions": self.caption_ids[indices].to(self.device),
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.clip(input_ids=batch["tokens"], pixel_values=batch["images"], return_dict=True)
        logits = output.logits_per_image.float()  # (images, captions)
        positives = (batch["captions"][:, None] == batch["captions"]).float()
        positives = positives / positives.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2
        hit = positives.gather(1, logits.argmax(dim=1, keepdim=True)) > 0
        words = self.word_loss(output.text_model_output.last_hidden_state, batch["tokens"])
        return loss + words, {"accuracy": hit.float().mean(), "word_loss": words}

    def word_loss(self, states: Tensor, tokens: Tensor) -> Tensor:
        """How badly the words (B, N) can be read from hidden states (B, N, C); padding does not count."""
        embeddings = self.clip.text_model.get_input_embeddings().weight
        cosines = F.normalize(states.float(), dim=-1) @ F.normalize(embeddings.float(), dim=-1).T
        padding = tokens == self.tokenizer.pad_token_id
        return F.cross_entropy(cosines[~padding] / WORD_TEMPERATURE, tokens[~padding])

    def similarity(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosines (images, captions)."""
        output = self.clip(input_ids=tokens, pixel_values=images, return_dict=True)
        return output.logits_per_image.float()

    def sample(self, path: Path) -> dict[str, float]:
        """Fraction of held-out images whose own caption is ranked first among 256; no picture."""
        indices = torch.arange(min(len(self.validation), 256))
        captions = [self.validation.captions[i] for i in indices]
        tokens = tokenize(self.tokenizer, captions).to(self.device)
        logits = self.similarity(self.validation.images(indices, self.device), tokens)
        ids = equal_caption_ids(captions).to(self.device)
        return {"validation_accuracy": float((ids[logits.argmax(dim=1)] == ids).float().mean())}

    def export(self, folder: Path) -> None:
        clip = copy.deepcopy(self.clip).cpu().half()
        text = CLIPTextModelWithProjection(clip.config.text_config)
        text.load_state_dict(clip.state_dict(), strict=False)
        vision = CLIPVisionModelWithProjection(clip.config.vision_config)
        vision.load_state_dict(clip.state_dict(), strict=False)
        encoder = CLIPTextModel(clip.config.text_config)
        encoder.load_state_dict(own_weights(encoder, clip.state_dict(), "text_model."))
        for name, model in zip(PARTS, (encoder, text, vision), strict=True):
            model.half().save_pretrained(folder / name)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        run_in_float32(folder)


def run_in_float32(folder: Path) -> None:
    """Let float16 files load as float32 by default, as diffusers' own parts do and `from_pretrained(folder)` needs.

    transformers would follow the precision that the configuration names. `dtype=` still overrides it.
    """
    for path in (folder / name / "config.json" for name in PARTS):
        if path.is_file():
            write_text(path, json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def own_weights(model: torch.nn.Module, weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `weights` that `model` has, with or without `prefix` in its names."""
    return {name: weights[name if name in weights else prefix + name] for name in model.state_dict()}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (N, model_max_length), padded and cut as the diffusers pipelines do."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def equal_caption_ids(captions: list[str]) -> Tensor:
    """One number per distinct caption (N,)."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(caption, len(first)) for caption in captions])
