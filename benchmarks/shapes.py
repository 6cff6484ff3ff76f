"""The models that are measured: Stable Diffusion 1.5 and XL with random weights, the avatar model, tiny ones."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from face_fusion_pipeline import (
    FaceFusionAdapter,
    StableDiffusionFaceFusionPipeline,
    StableDiffusionXLFaceFusionPipeline,
    create_adapter,
    embedded_model,
    load_adapter,
)
from face_fusion_pipeline.face_adapter import ADAPTER_WEIGHTS_NAME, AdapterMetadata
from face_fusion_pipeline.face_files import read_tensors


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. Speed depends on nothing else, so random weights will do.

    Attributes:
        size: side of the picture in pixels.
        reference: side of the reference in pixels as in the paper, `small` the cheaper one.
        unet, vae, text, vision: configurations; empty for a trained model that is loaded.
        text_2: of XL's second text encoder; empty for others.
    """

    name: str
    size: int
    reference: int
    small: int
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    text_2: Mapping[str, Any] = field(default_factory=dict)


OF_XL: dict[type, type] = {  # pipelines of 1.x -> those of XL
    StableDiffusionPipeline: StableDiffusionXLPipeline,
    StableDiffusionControlNetPipeline: StableDiffusionXLControlNetPipeline,
    StableDiffusionFaceFusionPipeline: StableDiffusionXLFaceFusionPipeline,
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
VIT_H = {  # ViT-H/14, the image encoder of every IP-Adapter for Stable Diffusion 1.5, and of "plus" for XL
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
TINY_VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TINY_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 32,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}
SHAPES = {
    "sd15": Shape(
        "sd15",
        size=512,
        reference=512,
        small=256,
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=SD15_VAE,
        text=CLIP_L,
        vision=VIT_H,
    ),
    "sdxl": Shape(
        "sdxl",
        size=1024,
        reference=1024,
        small=512,
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=SD15_VAE | {"scaling_factor": 0.13025},
        text=CLIP_L,
        text_2=CLIP_L  # ViT-bigG/14
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
        vision=VIT_H,
    ),
    "avatar": Shape("avatar", size=128, reference=128, small=64),
    "tiny": Shape(
        "tiny", size=16, reference=16, small=8, unet=TINY_UNET, vae=TINY_VAE, text=TINY_TEXT, vision=TINY_VISION
    ),
    "tiny-xl": Shape(
        "tiny-xl",
        size=16,
        reference=16,
        small=8,
        unet=TINY_UNET
        | {
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        vae=TINY_VAE,
        text=TINY_TEXT,
        text_2=TINY_TEXT,
        vision=TINY_VISION,
    ),
}


def picture(seed: int, side: int) -> Image.Image:
    """A picture of noise: what is on it makes no difference to the cost."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def twin(model: Any) -> Any:
    """A second model of the same weights: modules and attention processors of its own, storage shared."""
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy.eval().requires_grad_(False)


class Model:
    """The weights of one shape on a device; all pipelines that it makes share them.

    Args:
        shape: one of `SHAPES`.
        device: "cpu", "cuda", or "meta" to count without computing.
    """

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.components = self._trained() if not shape.unet else self._random()

    def _random(self) -> dict[str, Any]:
        shape = self.shape
        torch.manual_seed(0)
        of_words = {"bos_token_id": 0, "eos_token_id": 1}
        makers: dict[str, Callable[[], Any]] = {
            "vae": lambda: AutoencoderKL(**shape.vae),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**shape.text, **of_words)),
            "unet": lambda: UNet2DConditionModel(**shape.unet),
        }
        if self.is_xl:
            second = CLIPTextConfig(**shape.text_2, **of_words)
            makers["text_encoder_2"] = lambda: CLIPTextModelWithProjection(second)
        models = {}
        for name, make in makers.items():  # one after the other: in single precision all would not fit
            with torch.device(self.device):
                models[name] = make().to(self.dtype).eval().requires_grad_(False)
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
        vocabulary = {word: index for index, word in enumerate(words)}
        length = shape.text["max_position_embeddings"]
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        tokenizers = {"tokenizer": tokenizer, **({"tokenizer_2": tokenizer} if self.is_xl else {})}
        return {**models, **tokenizers, "scheduler": scheduler}

    def _trained(self) -> dict[str, Any]:
        parts = {"safety_checker": None, "image_encoder": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline.from_pretrained(embedded_model(), dtype=self.dtype, **parts).to(self.device)
        for model in (pipe.vae, pipe.text_encoder, pipe.unet):
            model.requires_grad_(False)
        return {name: part for name, part in pipe.components.items() if part is not None}

    @property
    def is_xl(self) -> bool:
        """Whether it is of the family of Stable Diffusion XL."""
        return bool(self.shape.text_2)

    @property
    def unet(self) -> Any:
        """The UNet that all others are twins of."""
        return self.components["unet"]

    @cached_property
    def adapter(self) -> FaceFusionAdapter:
        """The embedded weights of the avatar model, copies of the self-attention's for a random one."""
        if self.shape.unet:
            adapter = create_adapter(self.unet, metadata={"resolution": self.shape.reference}, dtype=self.dtype)
        else:
            weights, strings = read_tensors(embedded_model() / ADAPTER_WEIGHTS_NAME)
            adapter = load_adapter(self.unet, weights, AdapterMetadata.from_strings(strings))
        return adapter.to(self.device, self.dtype).requires_grad_(False)

    @cached_property
    def image_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder that an IP-Adapter needs; made when first asked for, as plain pipelines have none."""
        if not self.shape.unet:
            folder = embedded_model() / "image_encoder"
            encoder = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=self.dtype)
        else:
            with torch.device(self.device):
                encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**self.shape.vision))
        return encoder.to(self.device, self.dtype).eval().requires_grad_(False)

    @property
    def feature_extractor(self) -> CLIPImageProcessor:
        """What turns a PIL image into the image encoder's input."""
        side = self.image_encoder.config.image_size
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def pipeline(self, kind: type = StableDiffusionPipeline, **extra: Any) -> Any:
        """A pipeline of class `kind` with its own UNet over the shared weights, and the adapter if it takes one.

        Of XL it is the pipeline of XL that stands for `kind`.
        """
        scheduler = type(self.components["scheduler"]).from_config(self.components["scheduler"].config)
        parts = {**self.components, "unet": twin(self.unet), "scheduler": scheduler, **extra}
        if self.is_xl:
            pipe = OF_XL[kind](**{"add_watermarker": False, **parts})
        else:
            without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipe = kind(**without | parts)
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "set_face_fusion_adapter"):
            pipe.set_face_fusion_adapter(self.adapter)
        return pipe

    def through_file(self, identity: Any) -> Any:
        """An identity as a user has it who saved it: written to disk and read back."""
        with tempfile.TemporaryDirectory() as folder:
            identity.save(Path(folder) / "identity.safetensors")
            return type(identity).load(Path(folder) / "identity.safetensors")
