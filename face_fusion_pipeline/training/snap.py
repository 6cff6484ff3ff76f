"""The training of FaceSnap: its mixer and its ControlNet, on points, embeddings and patches computed before.

The target is a photo, its own facial points the control picture, and who it is comes from another photo of the person:
L = L_diffusion + λ √ᾱ L_id. The UNet is frozen and reads the caption, the ControlNet reads the mixer's tokens.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..face_attached import save_attached
from ..face_landmarks import landmark_maps
from ..face_snap import SNAP_WEIGHTS_NAME, FaceMixer, save_network
from ..unet_family import TEXT
from .base_model import BaseModel
from .kernels import plain_attention_on_cpu
from .loop import Batch, Part, seeded
from .objective import FaceEmbedder
from .pairs import Pairs, Reference
from .recomputation import enable_recomputation
from .snap_cache import SnapFeatures
from .task import FaceFusionOptions, FaceFusionTask


IDENTITY_LOSS_WEIGHT = 0.1  # λ, where there is something to take the loss by


@dataclass(frozen=True)
class SnapOptions(FaceFusionOptions):
    """What is learned, and from what; those of Face Fusion that do not apply are left at their defaults.

    Attributes:
        points_dropout: share of examples whose control picture is black.
        identity_loss_weight: λ; the loss is also weighed by √ᾱ, the share of the picture in what the UNet sees.
    """

    face_dropout: float = 0.1
    both_dropout: float = 0.0
    identity_loss_until: float = 1.0
    points_dropout: float = 0.05


class SnapTask(FaceFusionTask):
    """Trains the `mixer` that is attached to the UNet of the frozen `base`, and the ControlNet `network`.

    Args:
        features: of the folder that `train` and `validation` are from.
        embedder: for the identity loss.
    """

    name = "face-snap"
    published_as = "face-snap"

    def __init__(
        self,
        base: BaseModel,
        mixer: FaceMixer,
        network: Any,
        train: Pairs,
        features: SnapFeatures,
        validation: Pairs | None = None,
        options: SnapOptions | None = None,
        embedder: FaceEmbedder | None = None,
    ) -> None:
        super().__init__(base, mixer, train, validation, options or SnapOptions(), embedder)  # type: ignore[arg-type]
        del self.settings["face_mode"]  # a face is seen as tokens
        self.network, self.features = network, features
        for part in (self.adapter, self.network):
            part.requires_grad_(True)
            torch.nn.Module.float(part)  # the small weights learn in full precision
        if self.options.gradient_checkpointing:
            enable_recomputation(network)

    @property
    def subject(self) -> dict[str, Any]:
        return super().subject | {"conditioner": self.name}

    # --- Batches -------------------------------------------------------------------------------------------------

    def examples(self, pairs: Pairs, rows: Tensor, references: list[Reference]) -> Batch:
        starts = pairs.shards.reference_starts
        chosen = [starts[example] + number for example, number in references]
        return pairs.batch(rows) | {
            "points": self.features.points([pairs.targets[row] for row in rows.tolist()]),
            "face": self.features.faces(chosen),
            "patches": self.features.patches(chosen),
        }

    def part(self, part: Part, generator: torch.Generator, progress: float) -> Batch:
        batch = super().part(part, generator, progress)
        options: Any = self.options
        draws = torch.rand(part.batch_size, generator=seeded(part.seed, part.step, "points"))[part.rows]
        dropped = self.on_device(draws < options.points_dropout)
        batch["points"] = batch["points"].masked_fill(dropped[:, None, None], torch.nan)  # what is none is not drawn
        return batch

    # --- Loss ----------------------------------------------------------------------------------------------------

    def identity_tokens(self, batch: Batch) -> dict[str, Tensor]:
        """The tokens of a batch, under the name of the context that they make."""
        return {TEXT: self.adapter(batch["face"], batch["patches"], batch["has_face"])}

    def fused(self, batch: Batch, tokens: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Nothing is put into the UNet: the ControlNet reads the tokens."""
        self._tokens = tokens[TEXT]
        return nullcontext()

    def predicted(self, batch: Batch, noisy: Tensor) -> Tensor:
        conditions, side = {key: batch[key] for key in self.empty}, self.side(noisy)
        dots = landmark_maps(batch["points"][:, None], (side, side)).to(self.base.dtype) / 255
        reads = self.base.unet_arguments({**conditions, TEXT: self._tokens}, side)
        noisy, timesteps = noisy.to(self.base.dtype), batch["timesteps"]
        with plain_attention_on_cpu(noisy):
            down, middle = self.network(noisy, timesteps, controlnet_cond=dots, return_dict=False, **reads)
            return self.unet(
                noisy,
                timesteps,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                **self.unet_reads(batch, conditions, side),
            ).sample.float()

    def unet_reads(self, batch: Batch, conditions: dict[str, Tensor], side: int) -> dict[str, Any]:
        """What the UNet is told: the caption, and where the weights say so the tokens of those who are there."""
        metadata: Any = self.adapter.metadata
        if metadata.context == "none":
            return self.base.unet_arguments(conditions, side)
        text = conditions[TEXT]
        seen = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        seen = torch.cat([seen, batch["has_face"][:, None].expand(-1, self._tokens.shape[1])], 1)
        text = torch.cat([text.to(self._tokens.dtype), self._tokens], 1)
        return self.base.unet_arguments({**conditions, TEXT: text}, side) | {"encoder_attention_mask": seen}

    def identity_weights(self, timesteps: Tensor, has_face: Tensor) -> Tensor:
        """√ᾱ of those that have the loss."""
        alphas = self.base.schedule.alphas.to(timesteps.device)[timesteps]
        return super().identity_weights(timesteps, has_face) * alphas.sqrt()

    # --- Result --------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Write the weights in float16."""
        save_attached(self.unet, FaceMixer, folder / SNAP_WEIGHTS_NAME, torch.float16)
        network = copy.deepcopy(self.network)
        save_network(torch.nn.Module.half(network), folder)
