"""Random Stable Diffusion components small enough for tests; they need no files and no network."""

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import face_fusion_pipeline
from face_fusion_pipeline import face_people
from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_attention import FaceCall, FaceFusionAttnProcessor, LayerPeople
from face_fusion_pipeline.face_defaults import FACE_MODES
from face_fusion_pipeline.joint_attention import PersonKeys


torch.set_num_threads(1)  # several times faster at this size

CASES = [*(("sd", mode) for mode in FACE_MODES), ("xl", "both")]  # families and modes in which a face is seen
GUIDED = ("unconditional", "conditional")  # blocks of a batch under classifier-free guidance

TEXT_WIDTH = 24
TEXT_LENGTH = 12

STATES, SIZES = 2 * TEXT_WIDTH, 8  # of XL: width of the two encoders' states, numbers that each size becomes
XL_UNET = {
    "cross_attention_dim": STATES,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZES,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * SIZES,
}
SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}


def tiny_unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    """Four cross-attention layers, 16 and 32 wide, latents 8x8 of 4 channels."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**settings, **config}).eval()


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 2) -> ControlNetModel:
    """For a VAE that halves the picture once; no weight is zero."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_channels=3)
    net = ControlNetModel(
        **{
            **{k: v for k, v in net.config.items() if not k.startswith("_")},
            "conditioning_embedding_out_channels": (4, 8),
        }
    )
    for parameter in net.parameters():  # zero convolutions would change nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def tiny_tokenizer() -> CLIPTokenizer:
    tokens = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *tokens, *(f"{token}</w>" for token in tokens)]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_LENGTH)


def tiny_components(seed: int = 0, tiny_vae: bool = False, family: str = "sd") -> dict[str, Any]:
    """Components of a Stable Diffusion pipeline for 16x16 images."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_config = CLIPTextConfig(
        projection_dim=TEXT_WIDTH,
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae: AutoencoderKL | AutoencoderTiny
    if tiny_vae:
        widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    else:
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        )
    parts = {
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text_config).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "feature_extractor": None,
    }
    if family == "xl":
        second = CLIPTextModelWithProjection(text_config).eval()
        return parts | {"unet": tiny_unet(seed, **XL_UNET), "text_encoder_2": second, "tokenizer_2": tiny_tokenizer()}
    return parts | {"unet": tiny_unet(seed), "safety_checker": None, "requires_safety_checker": False}


def family_of(pipe: Any) -> str:
    return "xl" if hasattr(pipe, "text_encoder_2") else "sd"


def kind_of(family: str, task: str = "", ours: bool = True) -> Any:
    """The pipeline class for a task ("", "Img2Img", "Inpaint", "ControlNet") in a family, ours or diffusers'."""
    name = f"StableDiffusion{'XL' if family == 'xl' else ''}{task}{'FaceFusion' if ours else ''}Pipeline"
    return getattr(face_fusion_pipeline if ours else diffusers, name)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(seed: int = 0, family: str = "sd", **kwargs: Any) -> Any:
    return quiet(kind_of(family)(**tiny_components(seed, family=family, **kwargs)))


def stock_pipeline(family: str = "sd", task: str = "", **parts: Any) -> Any:
    """diffusers' own pipeline of the same components as [`tiny_pipeline`], and `parts`."""
    components = tiny_components(family=family) | {"image_encoder": None} | parts
    return quiet(kind_of(family, task, ours=False)(**components))


def for_task(pipe: Any, task: str) -> Any:
    """Our pipeline for a task in the family and of the components of `pipe`."""
    return quiet(kind_of(family_of(pipe), task).from_pipe(pipe))


def told_of_nothing(pipe: Any, side: int = 16) -> dict[str, Any]:
    """What the UNet is told when it looks at a reference: no words and, in XL, the size of the crop; by diffusers."""
    found = pipe.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    if family_of(pipe) == "sd":
        return {"encoder_hidden_states": found[0]}
    sizes = pipe._get_add_time_ids((side, side), (0, 0), (side, side), found[0].dtype, found[2].shape[-1])
    return {"encoder_hidden_states": found[0], "added_cond_kwargs": {"text_embeds": found[2], "time_ids": sizes}}


def embeddings(pipe: Any, prompt: str, negative: str = "") -> dict[str, Any]:
    """The arguments of a call that stand for a prompt and a negative prompt."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": negative}
    return dict(zip(names, pipe.encode_prompt(prompt, device="cpu", **options), strict=False))


def with_adapter(pipe: Any) -> Any:
    """`pipe` with random adapter weights, the same for every pipeline of this shape."""
    torch.manual_seed(1)
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16}))
    return pipe


def in_mode(pipe: Any, mode: str, monkeypatch: Any) -> Any:
    """`pipe` in which faces are encoded in `mode` where nothing else is said."""
    monkeypatch.setattr(face_people, "MODE_WITH_WEIGHTS", mode)
    return pipe if mode == "training-free" else with_adapter(pipe)


def one_face(
    key: Tensor, value: Tensor, *args: Any, call: FaceCall | None = None, **kwargs: Any
) -> FaceFusionAttnProcessor:
    """A processor with the same person for all rows."""
    return FaceFusionAttnProcessor([LayerPeople((PersonKeys(key, value, *args, **kwargs),))], call)


def identity_mask_bias(query_masks: Tensor, key_identity: Tensor) -> Tensor:
    """Eq. 7 as it is written, to compare with: -inf where the key is of one identity and the query in another's mask.

    Args:
        query_masks: bool `(n_identities, N_h)`, the region of each identity among the queries.
        key_identity: int `(K_f,)`, the identity that each face key belongs to.

    Returns:
        `(N_h, K_f)` of 0 and -inf. A query in two masks sees neither face, as the equation says.
    """
    inside = query_masks.to(torch.int64)
    inside_another = (inside.sum(0) - inside) > 0  # (n_identities, N_h)
    forbidden = inside_another[key_identity].T
    return torch.zeros(forbidden.shape).masked_fill(forbidden, -torch.inf)


def face(seed: int = 0, size: int = 16) -> Image.Image:
    """A picture of noise: what a face looks like does not matter to the algebra."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def generate(pipe: Any, prompt: Any = "a cat", seed: int = 0, **kwargs: Any) -> Tensor:
    """Latents of a short, deterministic run."""
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    count = (1 if isinstance(prompt, str) else len(prompt)) * kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return pipe(prompt, generator=generators, **{**settings, **kwargs}).images
