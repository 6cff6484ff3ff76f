"""Face Fusion as a variant: hidden states of the UNet, projected at the layers that the variant chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...face_adapter import FaceFusionAdapter, create_adapter
from ...face_attention import (
    attention_layers,
)
from ...face_self_attention import SelfAttentionReference
from ...joint_attention import PersonKeys
from ...reference_pass import (
    capture_hidden_states,
    face_tensors,
    noise_latents,
    self_attention_projections,
)
from ...training.base_model import BaseModel
from ...training.fused_unet import face_keys
from ...training.pairs import Pairs
from ...training.preparation import read_report
from .conditioning import Conditioning
from .encoders import Photo
from .variants import Variant, chosen_layers


class UNetFeatures(Conditioning):
    """Face Fusion, with what a variant changes in it: attention, layers, region, noise, initial weights.

    Without training it is the mode of that name: `SelfAttentionReference` says what is seen, and how strongly.
    """

    def __init__(self, base: BaseModel, variant: Variant, data: Path) -> None:
        super().__init__(variant)
        settings = read_report(data)["settings"]
        self.base, self.unet = base, base.unet
        self.kind = "attn2" if variant.trained else "attn1"
        self.own = None if variant.trained else SelfAttentionReference()
        self.layers = chosen_layers(list(attention_layers(self.unet, self.kind)), variant.layers)
        self.resolution: int = settings["reference_resolution"]
        self.face_crop: float = settings["face_crop"]
        self.timestep = self.own.timestep if self.own else round(variant.reference_noise * len(base.schedule))
        self.empty = base.conditions([""])["text"]
        metadata = {
            "reference_mode": "noised" if self.timestep else "clean",
            "reference_timestep": self.timestep,
            "token_count_bias": variant.token_count_bias,
            "face_crop": self.face_crop,
            "resolution": self.resolution,
        }
        self.adapter: nn.Module = nn.Identity()  # training-free: nothing is learned
        if variant.trained:
            self.adapter = with_layers(create_adapter(self.unet, variant.init, metadata=metadata), self.layers)

    def from_data(self, pairs: Pairs, references: list[tuple[int, int]]) -> Tensor:
        return pairs.reference_latents(references)

    def from_photos(self, photos: list[Photo]) -> Tensor:
        return self.base.latents(torch.cat(face_tensors([photo.face for photo in photos], self.resolution)))

    @torch.no_grad()
    def states(self, inputs: Tensor) -> dict[str, Tensor]:
        """h_f of Eq. 2 in the variant's layers and region."""
        latents = noise_latents(inputs, self.base.schedule.alphas, self.timestep).to(self.unet.device, self.unet.dtype)
        text = self.empty.to(latents.device, latents.dtype)
        return self.chosen(capture_hidden_states(self.unet, latents, self.timestep, text, self.kind))

    def chosen(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the states of all layers (B, N_f, C) those of the variant's layers and region."""
        if self.own:
            return self.own.chosen(states)[0]
        states = {name: states[name] for name in self.layers}
        if self.variant.region == "face":
            states = {
                name: state[:, central_cells(state.shape[1], 1 / self.face_crop)] for name, state in states.items()
            }
        return states

    def seen(
        self, states: Mapping[str, Tensor], has_face: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, PersonKeys]:
        bias = self.variant.token_count_bias
        if self.own is None:
            return face_keys(self.adapter, states, has_face, scale=scale, token_count_bias=bias)
        project = partial(self_attention_projections, self.unet)
        return face_keys(project, states, has_face, scale=scale * self.own.scale, token_count_bias=False)


def with_layers(adapter: FaceFusionAdapter, names: list[str]) -> FaceFusionAdapter:
    """The adapter without the other layers."""
    weights = adapter.state_dict()
    shapes = {name: weights[f"{name}.to_k_face.weight"].shape for name in names}
    kept = FaceFusionAdapter({name: (shape[1], shape[0]) for name, shape in shapes.items()}, adapter.metadata)
    kept.load_state_dict({key: weights[key] for key in kept.state_dict()})
    return kept.to(next(adapter.parameters()))


def central_cells(count: int, fraction: float) -> Tensor:
    """Indices of those cells of a square grid of `count` whose centres lie in its central square of side `fraction`.

    A face crop is the box's longer side enlarged: its box lies in the middle, 1 / enlargement of it wide.
    """
    side = math.isqrt(count)
    centres = (torch.arange(side) + 0.5) / side
    inside = (centres - 0.5).abs() <= fraction / 2
    return (inside[:, None] & inside[None]).flatten().nonzero()[:, 0]
