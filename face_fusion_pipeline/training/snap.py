"""The training of FaceSnap: its mixer and its ControlNet, on points, embeddings and patches computed before.

The target is a photo, its own facial points the control picture, and who it is comes from another photo of the person:
L = L_diffusion + λ √ᾱ L_id. The UNet is frozen and reads the caption, the ControlNet reads the mixer's tokens.

What a caption says the points need not. In a share of the examples its words of expressions are hidden: what is to be
predicted is then what weights predict that know poses already, and read the whole caption. So all that is to be
learned is what the hidden words say.
"""

from __future__ import annotations

import copy
import math
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
from .latent_cache import Captions
from .loop import Batch, Part, digest, seeded
from .objective import FaceEmbedder
from .pairs import Pairs, Reference
from .recomputation import enable_recomputation
from .snap_cache import SnapFeatures
from .task import FaceFusionOptions, FaceFusionTask


IDENTITY_LOSS_WEIGHT = 0.1  # λ, where there is something to take the loss by
HIDDEN_FRACTION = 0.5  # of examples whose caption lacks the hidden phrases, where there are such
# How strongly they act on what is learned: words are strengthened by guidance in every picture, points are not.
HIDDEN_GUIDANCE = 4.0
HIDDEN_WEIGHT = 10.0  # a prediction is learned there, not noise: the error is far smaller than elsewhere
WHOLE, HIDDEN = "whole ", "hidden "  # prefixes of conditions in a batch: of the caption, and of what is left of it


@dataclass(frozen=True)
class SnapOptions(FaceFusionOptions):
    """What is learned, and from what; those of Face Fusion that do not apply are left at their defaults.

    Attributes:
        points_dropout: share of examples whose control picture is black.
        hidden_fraction: share of examples whose caption is read without the hidden phrases.
        identity_loss_weight: λ; the loss is also weighed by √ᾱ, the share of the picture in what the UNet sees.
    """

    face_dropout: float = 0.1
    both_dropout: float = 0.0
    identity_loss_until: float = 1.0
    points_dropout: float = 0.05
    hidden_fraction: float = 0.0


class SnapTask(FaceFusionTask):
    """Trains the `mixer` that is attached to the UNet of the frozen `base`, and the ControlNet `network`.

    Args:
        features: of the folder that `train` and `validation` are from.
        embedder: for the identity loss.
        hidden: the captions without what the points say, see `hidden_phrases`.
        teacher: a mixer and a ControlNet that know poses, who read the whole captions; None: those at the start.
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
        hidden: Captions | None = None,
        teacher: tuple[FaceMixer, Any] | None = None,
    ) -> None:
        super().__init__(base, mixer, train, validation, options or SnapOptions(), embedder)  # type: ignore[arg-type]
        del self.settings["face_mode"]  # a face is seen as tokens
        self.network, self.features, self.hidden = network, features, hidden
        for part in (self.adapter, self.network):
            part.requires_grad_(True)
            torch.nn.Module.float(part)  # the small weights learn in full precision
        if hidden is not None:
            self.readers = torch.nn.ModuleList(teacher or copy.deepcopy((mixer, network))).requires_grad_(False)
        if self.options.gradient_checkpointing:
            enable_recomputation(network)

    @property
    def subject(self) -> dict[str, Any]:
        taught = (
            {} if self.hidden is None else {"hidden": self.hidden.key, "teacher": digest(self.readers.state_dict())}
        )
        return super().subject | {"conditioner": self.name} | taught

    # --- Batches -------------------------------------------------------------------------------------------------

    def examples(self, pairs: Pairs, rows: Tensor, references: list[Reference]) -> Batch:
        starts = pairs.shards.reference_starts
        chosen = [starts[example] + number for example, number in references]
        indices = [pairs.targets[row] for row in rows.tolist()]
        batch = pairs.batch(rows) | {
            "points": self.features.points(indices),
            "face": self.features.faces(chosen),
            "patches": self.features.patches(chosen),
        }
        if self.hidden is not None and pairs is self.pairs:
            batch |= {WHOLE + key: batch[key] for key in self.empty}
            batch |= {HIDDEN + key: state.float() for key, state in self.hidden.take(indices).items()}
        return batch

    def part(self, part: Part, generator: torch.Generator, progress: float) -> Batch:
        batch = super().part(part, generator, progress)
        options: Any = self.options
        draws = torch.rand(part.batch_size, generator=seeded(part.seed, part.step, "points"))
        dropped = draws < options.points_dropout
        nothing = self.on_device(dropped[part.rows])[:, None, None]
        batch["points"] = batch["points"].masked_fill(nothing, torch.nan)  # what is none is not drawn
        if self.hidden is not None:  # as many of each whole batch, of those with points before all others
            unread = torch.zeros(part.batch_size, dtype=torch.bool)
            unread[(draws + dropped).argsort()[: math.ceil(part.batch_size * options.hidden_fraction)]] = True
            batch["unread"] = rows = self.on_device(unread[part.rows].nonzero()[:, 0])
            for key in self.empty:
                batch[key] = batch[key].index_copy(0, rows, batch.pop(HIDDEN + key)[rows])
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
        return self.predicted_by(self.network, self._tokens, batch, noisy)

    def predicted_by(self, network: Any, tokens: Tensor, batch: Batch, noisy: Tensor) -> Tensor:
        """What the UNet predicts with what a ControlNet adds, which reads these tokens."""
        conditions, side, timesteps = {key: batch[key] for key in self.empty}, self.side(noisy), batch["timesteps"]
        noisy = noisy.to(self.base.dtype)
        dots = landmark_maps(batch["points"][:, None], (side, side)).to(self.base.dtype) / 255
        told = self.network_reads(conditions, tokens, side)
        with plain_attention_on_cpu(noisy):
            down, middle = network(noisy, timesteps, controlnet_cond=dots, return_dict=False, **told)
            found: Tensor = self.unet(
                noisy,
                timesteps,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                **self.unet_reads(conditions, tokens, batch["has_face"], side),
            ).sample.float()
        return found

    def target(self, batch: Batch, noisy: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """The noise; of examples whose caption is not read whole, what those predict who read it."""
        target = super().target(batch, noisy, tokens)
        if self.training and len(batch.get("unread", ())):
            target = target.index_copy(0, batch["unread"], self.read_whole(batch, noisy))
        return target

    @torch.no_grad()
    def read_whole(self, batch: Batch, noisy: Tensor) -> Tensor:
        """What the teacher predicts of these examples with the whole caption, guided by the hidden phrases."""
        mixer, network = self.readers
        rows = batch["unread"]
        part = {key: batch[key][rows] for key in ("points", "timesteps", "has_face", *self.empty)}
        tokens = mixer(batch["face"][rows], batch["patches"][rows], part["has_face"])
        left = self.predicted_by(network, tokens, part, noisy[rows])
        part |= {key: batch[WHOLE + key][rows] for key in self.empty}
        return torch.lerp(left, self.predicted_by(network, tokens, part, noisy[rows]), HIDDEN_GUIDANCE)

    def loss_weights(self, batch: Batch) -> Tensor:
        weights = super().loss_weights(batch)
        if "unread" in batch and self.training:
            weights = weights.index_copy(0, batch["unread"], HIDDEN_WEIGHT * weights[batch["unread"]])
        return weights

    def network_reads(self, conditions: dict[str, Tensor], tokens: Tensor, side: int) -> dict[str, Any]:
        """What the ControlNet is told: who it is, in the place of the text."""
        return self.base.unet_arguments({**conditions, TEXT: tokens}, side)

    def unet_reads(self, conditions: dict[str, Tensor], tokens: Tensor, has_face: Tensor, side: int) -> dict[str, Any]:
        """What the UNet is told: the caption, and where the weights say so the tokens of those who are there."""
        metadata: Any = self.adapter.metadata
        if metadata.context == "none":
            return self.base.unet_arguments(conditions, side)
        text = conditions[TEXT]
        seen = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        seen = torch.cat([seen, has_face[:, None].expand(-1, tokens.shape[1])], 1)
        text = torch.cat([text.to(tokens.dtype), tokens], 1)
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
