"""Components of a pipeline as one file in the original layout of Stable Diffusion, as model sites give checkpoints.

The inverse of what `from_single_file` of diffusers reads. Widths do not matter, so it serves tiny models as well.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj"}


def renamed(rest: str, names: dict[str, str]) -> str:
    """`"norm1.weight"` -> `"in_layers.0.weight"`; names that are not listed stay."""
    name, _, kind = rest.rpartition(".")
    return f"{names.get(name, name)}.{kind}"


def unet_name(key: str, layers: int) -> str:
    """Of a UNet with so many layers a block."""
    parts = key.split(".")
    if parts[0] == "mid_block":
        kind, index, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        return (
            f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * index}.{renamed(rest, RESNET)}"
        )
    if parts[0] not in ("down_blocks", "up_blocks"):
        return renamed(key, UNET_ENDS)
    block, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    first, side = block * (layers + 1), "output_blocks"
    if parts[0] == "down_blocks":
        first, side = first + 1, "input_blocks"
    if kind == "downsamplers":
        return f"{side}.{first + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"{side}.{first + layers}.UP.{rest}"
    slot, rest = ("0", renamed(rest, RESNET)) if kind == "resnets" else ("1", rest)
    return f"{side}.{first + index}.{slot}.{rest}"


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """`model.diffusion_model.*`."""
    named = {unet_name(key, unet.config.layers_per_block): tensor for key, tensor in unet.state_dict().items()}
    found = {}
    for key, tensor in named.items():  # an upsampler comes after a block's attention, where there is one
        block = key.split(".UP.")[0]
        after = "2" if any(other.startswith(f"{block}.1.") for other in named) else "1"
        found["model.diffusion_model." + key.replace(".UP.", f".{after}.")] = tensor
    return found


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """`first_stage_model.*`."""
    blocks = len(vae.config.up_block_types)
    found = {}
    for key, tensor in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        up = re.search(r"up_blocks\.(\d+)", name)
        if up:
            name = name.replace(up[0], f"up.{blocks - 1 - int(up[1])}")
            name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
        if attention := re.search(r"mid_block\.attentions\.0\.", name):
            name = name[: attention.start()] + "mid.attn_1." + renamed(name[attention.end() :], VAE_ATTENTION)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # a convolution of one pixel
        found["first_stage_model." + name] = tensor
    return found


def clip_tensors(text_encoder: Any, place: str = "cond_stage_model.") -> dict[str, Tensor]:
    """`cond_stage_model.transformer.*` of Stable Diffusion 1.x, or the same in another place."""
    prefix = place + "transformer.text_model."
    return {prefix + k.removeprefix("text_model."): tensor for k, tensor in text_encoder.state_dict().items()}


def open_clip_tensors(text_encoder: Any, place: str = "cond_stage_model.") -> dict[str, Tensor]:
    """`cond_stage_model.model.*` of Stable Diffusion 2.x: queries, keys and values lie in one tensor."""
    state = {key.removeprefix("text_model."): tensor for key, tensor in text_encoder.state_dict().items()}
    prefix = place + "model."
    found = {
        prefix + "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        prefix + "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        prefix + "ln_final.weight": state.pop("final_layer_norm.weight"),
        prefix + "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in state:
        found[prefix + "text_projection"] = state.pop("text_projection.weight").T
    for key, tensor in state.items():
        layer, rest = re.match(r"encoder\.layers\.(\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
        begin = f"{prefix}transformer.resblocks.{layer}."
        if at := re.match(r"self_attn\.q_proj\.(weight|bias)", rest):
            parts = [state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            found[f"{begin}attn.in_proj_{at[1]}"] = torch.cat(parts)
        elif ".out_proj" in rest:
            found[begin + rest.replace("self_attn", "attn")] = tensor
        elif "_proj" not in rest:
            found[begin + re.sub("|".join(OPEN_CLIP), lambda at: OPEN_CLIP[at[0]], rest)] = tensor
    return found


def save_checkpoint(pipe: Any, path: Path, open_clip: bool = False, **further: Tensor) -> Path:
    """Write the weights of a pipeline into one file; `further` are tensors of other names."""
    if hasattr(pipe, "text_encoder_2"):
        text = clip_tensors(pipe.text_encoder, "conditioner.embedders.0.")
        text |= open_clip_tensors(pipe.text_encoder_2, "conditioner.embedders.1.")
    else:
        text = open_clip_tensors(pipe.text_encoder) if open_clip else clip_tensors(pipe.text_encoder)
    tensors = unet_tensors(pipe.unet) | vae_tensors(pipe.vae) | text | further
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
