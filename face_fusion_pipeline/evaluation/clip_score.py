"""CLIP score: does the picture show what the prompt asks for? And CLIP-IQA: does it look like a good photo?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..face_errors import ModelNotFoundError


QUALITY_PROMPTS = ("Good photo.", "Bad photo.")  # of CLIP-IQA (arXiv 2207.12396)
CLIP_ID = "openai/clip-vit-large-patch14"


class ClipScore:
    """A CLIP as evaluator of prompts.

    Args:
        model: folder or Hub id of a CLIP; or a model folder with `image_encoder/` and `clip_score/`, such as the
            embedded avatar model, whose CLIP knows its own captions and no words for quality.

    Raises ModelNotFoundError where it cannot be read.
    """

    def __init__(self, model: str | Path, *, device: str | torch.device = "cpu") -> None:
        folder = Path(model)
        self.knows_quality = not is_pipeline_folder(folder)
        try:
            if self.knows_quality:
                clip = CLIPModel.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
                self.processor = CLIPImageProcessorPil.from_pretrained(model)
                self.tokenizer = CLIPTokenizer.from_pretrained(model)
            else:
                clip = load_clip(folder)
                side = clip.config.vision_config.image_size
                half = [0.5, 0.5, 0.5]
                self.processor = CLIPImageProcessorPil(
                    size={"shortest_edge": side},
                    crop_size={"height": side, "width": side},
                    image_mean=half,
                    image_std=half,
                )
                self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFoundError(f"cannot load the CLIP {model}: {error}") from error
        self.clip = clip.eval().requires_grad_(False).to(device)
        self.name = Path(model).name if folder.exists() else str(model)

    @torch.inference_mode()
    def score(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        """What there is to say about a picture.

        `clip_score`: 100 cos(image, prompt), not below 0, if there is a prompt; `quality` in [0, 1] (CLIP-IQA) if this
        CLIP knows words for it; `clip_embedding`: the image's own, of unit length.
        """
        texts = [prompt, *(QUALITY_PROMPTS if self.knows_quality else ())]
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        device = self.clip.device
        output = self.clip(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            pixel_values=pixels.to(device),
        )
        cosines = (output.text_embeds @ output.image_embeds[0]).float().cpu()  # both are of unit length
        row: dict[str, Any] = {"clip_embedding": [round(value, 6) for value in output.image_embeds[0].tolist()]}
        if prompt:
            row["clip_score"] = max(0.0, 100 * float(cosines[0]))
        if self.knows_quality:
            row["quality"] = float((100 * cosines[-2:]).softmax(0)[0])
        return row


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a model folder brings a CLIP of its own along."""
    return (folder / "clip_score").is_dir() and (folder / "image_encoder").is_dir()


def load_clip(folder: Path) -> CLIPModel:
    """Both towers in a pipeline folder as one CLIP; the temperature starts at CLIP's usual 1/0.07."""
    text = CLIPTextModelWithProjection.from_pretrained(folder / "clip_score", dtype=torch.float32)
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32)
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config=vision.config.to_dict(),
        projection_dim=text.config.projection_dim,
    )
    clip = CLIPModel(config)
    clip.load_state_dict({**clip.state_dict(), **text.state_dict(), **vision.state_dict()})
    return clip
