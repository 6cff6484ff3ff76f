"""The training of FaceStudio: its Linear and its LoRA, on embeddings that were computed before.

The paper's self-reconstruction: the picture whose face is covered, and the face, give the picture back. Where there is
another photo of the person, the face is from that one. Of a base whose image encoder does not see who somebody is, a
share of the pictures is not covered: their embeddings then also say what a covered face cannot, such as its
expression, as those that the prior makes of a prompt do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..face_adapter import FaceFusionAdapter
from ..face_studio import STUDIO_WEIGHTS_NAME, FaceStudio, lora_state, save_studio, set_lora, studio_lora
from ..unet_family import TEXT
from .base_model import BaseModel
from .fused_unet import face_fused_unet
from .kernels import plain_attention_on_cpu
from .loop import Batch, Part, seeded
from .pairs import Pairs, Reference
from .studio_cache import Embeddings
from .task import FaceFusionOptions, FaceFusionTask


FACE_SPREAD = 0.3  # how far a face moves the first tokens, over the spread of text states


@dataclass(frozen=True)
class StudioOptions(FaceFusionOptions):
    """What is learned, and from what; those of Face Fusion that do not apply are left at their defaults.

    Attributes:
        style_dropout: share of examples without their picture.
        whole_pictures: share of the pictures that are not covered.
        appended: share of the batches whose tokens follow the caption instead of taking its place.
        teacher_weight: share of a teacher's prediction in what is learned, the rest is the noise itself. The teacher
            is Face Fusion, which sees the caption and another photo of the person, see `task`.
    """

    face_dropout: float = 0.1  # of the paper
    both_dropout: float = 0.0
    style_dropout: float = 0.64  # of the paper
    whole_pictures: float = 0.0
    appended: float = 0.5
    teacher_weight: float = 0.0


class StudioTask(FaceFusionTask):
    """Trains what `face_studio.attach` has put into the frozen `base`.

    Args:
        embeddings: of the folder that `train` and `validation` are from.
        teacher: Face Fusion weights for the same base.
    """

    name = "face-studio"
    published_as = "face-studio"

    def __init__(
        self,
        base: BaseModel,
        studio: FaceStudio,
        train: Pairs,
        embeddings: Embeddings,
        validation: Pairs | None = None,
        options: StudioOptions | None = None,
        teacher: FaceFusionAdapter | None = None,
    ) -> None:
        chosen = options or StudioOptions()
        super().__init__(base, studio, train, validation, chosen, teacher=teacher)  # type: ignore[arg-type]
        del self.settings["face_mode"]  # a face is seen as tokens
        self.embeddings = embeddings
        self.adapter.requires_grad_(True)
        for tensor in lora_state(self.unet).values():
            tensor.requires_grad_(True)
            tensor.data = tensor.data.float()  # the small weights learn in full precision
        set_lora(self.unet, True)
        self.adapter.float()

    @property
    def subject(self) -> dict[str, Any]:
        return super().subject | {"conditioner": self.name}

    # --- Batches -------------------------------------------------------------------------------------------------

    def part(self, part: Part, generator: torch.Generator, progress: float) -> Batch:
        batch = super().part(part, generator, progress)
        options: Any = self.options
        draws = seeded(part.seed, part.step, "studio")
        appended, *_ = torch.rand(1, generator=draws).tolist()
        styles = torch.rand(2, part.batch_size, generator=draws)[:, part.rows]
        whole = self.on_device(styles[0] < options.whole_pictures)[:, None]
        batch["picture"] = torch.where(whole, batch.pop("whole"), batch.pop("covered"))
        batch["picture"] = batch["picture"] * self.on_device(styles[1] >= options.style_dropout)[:, None]
        batch["appended"] = torch.tensor(appended < options.appended)
        return batch

    def examples(self, pairs: Pairs, rows: Tensor, references: list[Reference]) -> Batch:
        indices = [pairs.targets[row] for row in rows.tolist()]
        starts = pairs.shards.reference_starts
        seen = {} if self.teacher is None else {"reference": pairs.reference_latents(references)}
        return (
            pairs.batch(rows)
            | seen
            | {
                "whole": self.embeddings.whole(indices).float(),
                "covered": self.embeddings.covered(indices).float(),
                "face": self.embeddings.faces([starts[example] + number for example, number in references]).float(),
            }
        )

    # --- Loss ----------------------------------------------------------------------------------------------------

    def identity_tokens(self, batch: Batch) -> dict[str, Tensor]:
        """The tokens of a batch, under the name of the context that they make."""
        picture = batch["picture"] if "picture" in batch else batch["covered"]
        return {TEXT: self.adapter(picture, batch["face"] * batch["has_face"][:, None])}

    def fused(self, batch: Batch, tokens: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Nothing is put into the UNet: its context is changed."""
        self._tokens = tokens[TEXT]
        return nullcontext()

    def predicted(self, batch: Batch, noisy: Tensor) -> Tensor:
        conditions = {key: batch[key] for key in self.empty}
        tokens = self._tokens
        if "appended" in batch and bool(batch["appended"]):
            tokens = torch.cat([conditions[TEXT].to(tokens.dtype), tokens], 1)
        arguments = self.base.unet_arguments({**conditions, TEXT: tokens}, self.side(noisy))
        with plain_attention_on_cpu(noisy):
            return self.unet(noisy.to(self.base.dtype), batch["timesteps"], **arguments).sample.float()

    @torch.no_grad()
    def taught(self, batch: Batch, noisy: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """The noise, and what Face Fusion predicts of it, in their shares."""
        options: Any = self.options
        schedule = self.base.schedule
        target = schedule.target(batch["latents"], batch["noise"], batch["timesteps"])
        with studio_lora(self.unet, acts=False):
            states = super().identity_tokens(batch)
            with face_fused_unet(self.unet, self.teacher, states, batch["has_face"], places=self.places(batch)):
                predicted = super().predicted(batch, noisy)
        return torch.lerp(target, predicted, options.teacher_weight)

    # --- Result --------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Write the weights in float16."""
        save_studio(self.unet, folder / STUDIO_WEIGHTS_NAME, torch.float16)


@torch.no_grad()
def fit_to_captions(studio: FaceStudio, pairs: Pairs, embeddings: Embeddings, ridge: float = 0.01) -> float:
    """Let the Linear begin with tokens that say what the last states of a caption say; a face moves them at random.

    Those states hold the whole caption, and the UNet knows how to read them: so a training begins with pictures of the
    right kind. Least squares with a ridge, from the embeddings of pictures as they are.

    Returns:
        the share of the states' variance that the tokens explain.
    """
    count, width = studio.metadata.tokens, studio.metadata.image_width
    rows = pairs.targets[:: max(1, len(pairs.targets) // 8192)]
    known = torch.cat([embeddings.whole(rows).double(), torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    states = torch.cat(
        [
            pairs.shards.conditions(rows[start : start + 512])[TEXT][:, -count:].flatten(1).double()
            for start in range(0, len(rows), 512)
        ]
    )
    penalty = ridge * torch.eye(known.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    solved = torch.linalg.solve(known.T @ known + penalty, known.T @ states)
    weight, bias = studio.projection.weight, studio.projection.bias
    weight.zero_()
    weight[:, :width] = solved[:-1].T.to(weight)
    spread = FACE_SPREAD * float(states.std())
    torch.nn.init.normal_(weight[:, width:], std=spread)  # zeros would be read by nobody, and so stay for long
    bias.copy_(solved[-1])
    left = (states - known @ solved).square().sum() / (states - states.mean(0)).square().sum()
    return 1 - float(left)
