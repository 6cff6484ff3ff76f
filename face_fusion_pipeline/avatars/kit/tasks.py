"""The trainings of a stage, on scenes that lie on the device: the base, Face Fusion and the depth ControlNet.

Each is the training that the command of its name does, with other data. The base also learns its text encoder: one
that is trained for nothing but scores has no reason to keep apart all that a picture needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from ...face_adapter import FaceFusionAdapter
from ...training.base_model import TEXT, BaseModel
from ...training.fused_unet import face_fused_unet
from ...training.loop import Batch, Task, seeded
from ...training.pairs import Pairs, Reference
from ...training.task import FaceFusionOptions, FaceFusionTask
from ..training.controlnet import ControlNetTask
from ..training.data import save_grid
from ..training.unet import DiffusionLoss, Frozen, UnetTask
from .scene_tensors import SceneTensors


PLAIN, FULL = 0, 1
PLAIN_SHARE = 0.3  # of the captions that the base learns from
TEXT_DROPOUT = 0.1


def empty_tokens(frozen: Frozen) -> Tensor:
    """The tokens (T,) of the empty prompt."""
    return frozen.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]


class BaseTask(UnetTask):
    """Trains UNet and text encoder; the fractions of plain, full and no captions are fixed."""

    def __init__(
        self, unet: UNet2DConditionModel, frozen: Frozen, train: SceneTensors, held_out: SceneTensors, key: str
    ) -> None:
        Task.__init__(self)
        self.unet, self.text_encoder = unet.requires_grad_(True), frozen.text_encoder.requires_grad_(True)
        self.vae, self.frozen, self.key = frozen.vae, frozen, key
        self.data, self.held_out, self.size = train, held_out, len(train)
        self.loss = self.even_loss = DiffusionLoss(face_weight=3.0)
        self.empty = empty_tokens(frozen).to(train.tokens.device)
        self.settings = {"plain_captions": PLAIN_SHARE, "text_dropout": TEXT_DROPOUT, "face_loss_weight": 3.0}

    @property
    def subject(self) -> dict[str, Any]:
        return {**self.settings, "data": self.key}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The UNet alone: what compiles with autocast inside is not found again in the cache of compiled graphs."""
        self.unet.compile(*args, **kwargs)

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        indices = indices.to(self.data.latents.device, non_blocking=True)
        batch = self.rows(self.data, indices)
        draws = torch.rand(2, len(indices), generator=generator, device=generator.device)
        length = torch.where(draws[0] < PLAIN_SHARE, PLAIN, FULL)
        tokens = self.data.tokens[indices, length]
        batch["tokens"] = torch.where(draws[1, :, None] < TEXT_DROPOUT, self.empty, tokens)
        return batch | self.loss.draw(batch["latents"].shape, generator)

    @staticmethod
    def rows(data: SceneTensors, indices: Tensor) -> Batch:
        return {"latents": data.latents[indices].float(), "faces": data.emphasis[indices]}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(batch | {"text": self.text_encoder(batch["tokens"])[0]})

    @torch.compiler.set_stance("force_eager")  # other sizes: not worth compiling for
    def sample(self, path: Path) -> dict[str, float]:
        """Held-out full captions, the same scenes by their plain ones, the true pictures; the loss with both kinds."""
        rows = torch.arange(min(len(self.held_out), 8), device=self.data.latents.device)
        drawn = [draw(self.frozen, self.unet, self.held_out.tokens[rows, kind]) for kind in (FULL, PLAIN)]
        save_grid([*drawn, decoded(self.frozen, self.held_out.latents[rows].float())], path)
        losses = {}
        rows = torch.arange(min(len(self.held_out), 128), device=rows.device)
        for name, kind in (("full", FULL), ("plain", PLAIN)):
            batch = self.rows(self.held_out, rows) | {"tokens": self.held_out.tokens[rows, kind]}
            batch |= self.loss.draw(batch["latents"].shape, seeded(0, 0, "validation", self.device))
            losses[f"validation_loss_{name}"] = float(self.forward(batch)[0])
        self.export(path.parent / "average")  # what is there now, should the stage be cut off
        return losses


@torch.no_grad()
def prompt_states(frozen: Frozen, tokens: Tensor) -> dict[str, Tensor]:
    """What a pipeline is told of captions and of the empty one, by tokens (B, T)."""
    text = frozen.text_encoder(tokens)[0]
    empty = frozen.text_encoder(empty_tokens(frozen)[None].to(tokens.device))[0].expand_as(text)
    return {"prompt_embeds": text, "negative_prompt_embeds": empty}


@torch.no_grad()
def draw(frozen: Frozen, unet: UNet2DConditionModel, tokens: Tensor, seed: int = 0, **options: Any) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] of tokens (B, T), as the embedded model draws them."""
    pipe = frozen.pipeline(unet)
    found = pipe(
        **prompt_states(frozen, tokens),
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=seeded(seed, 0, "sample"),
        output_type="pt",
        **options,
    )
    return found.images * 2 - 1


@torch.no_grad()
def decoded(frozen: Frozen, latents: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] of scaled latents."""
    return frozen.vae.decode(latents / frozen.vae.config.scaling_factor).sample


class DepthTask(ControlNetTask):
    """Trains the ControlNet on the scenes' depth, with plain and full captions."""

    def __init__(
        self,
        controlnet: ControlNetModel,
        unet: UNet2DConditionModel,
        frozen: Frozen,
        train: SceneTensors,
        held_out: SceneTensors,
        key: str,
    ) -> None:
        Task.__init__(self)
        self.controlnet = controlnet.requires_grad_(True)
        self.unet, self.frozen, self.key = unet.requires_grad_(False).eval(), frozen, key
        self.vae, self.text_encoder = frozen.vae, frozen.text_encoder.requires_grad_(False).eval()
        self.data, self.held_out, self.size = train, held_out, len(train)
        self.loss = DiffusionLoss(face_weight=1.0)
        self.empty = empty_tokens(frozen).to(train.tokens.device)

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.key}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Both networks; see `BaseTask.compile`."""
        self.unet.compile(*args, **kwargs)
        self.controlnet.compile(*args, **kwargs)

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        indices = indices.to(self.empty.device, non_blocking=True)
        draws = torch.rand(2, len(indices), generator=generator, device=generator.device)
        kind = (draws[0] < 0.5).long()
        tokens = torch.where(draws[1, :, None] < TEXT_DROPOUT, self.empty, self.data.tokens[indices, kind])
        batch = self.scenes(self.data, indices, indices, tokens)
        return batch | self.loss.draw(batch["latents"].shape, generator)

    @torch.no_grad()
    def scenes(self, data: SceneTensors, indices: Tensor, depths: Tensor, tokens: Tensor) -> Batch:
        """The scenes `indices` with the depth maps of the scenes `depths`."""
        near = data.depth[depths].float().div(255).expand(-1, 3, -1, -1)
        text = self.text_encoder(tokens)[0]
        return {**BaseTask.rows(data, indices), "depth": near, "text": text}

    def examples(self, data: SceneTensors, indices: Tensor, depths: Tensor) -> Batch:
        return self.scenes(data, indices, depths, data.tokens[indices, PLAIN])

    def prompts(self, rows: Tensor) -> dict[str, Any]:
        return prompt_states(self.frozen, self.held_out.tokens[rows, PLAIN])

    def pictures(self, rows: Tensor) -> Tensor:
        return decoded(self.frozen, self.held_out.latents[rows].float())


@dataclass
class ScenePairs(Pairs):
    """Targets of drawn scenes, with other pictures of the same person as references.

    Only plain captions: who is shown comes from the face.
    """

    data: SceneTensors
    text_encoder: nn.Module
    key: str

    def __post_init__(self) -> None:
        people = self.data.of_target(self.data.identities).tolist()
        alone = (self.data.identities >= 0).sum(1).eq(1) & self.data.photo
        known: dict[int, list[int]] = {}
        for index, (person, usable) in enumerate(zip(people, alone.tolist(), strict=True)):
            if usable:
                known.setdefault(person, []).append(index)
        self.references = {
            index: [(other, 0) for other in known.get(person, []) if other != index]
            for index, person in enumerate(people)
        }
        self.targets = [index for index, found in self.references.items() if found]
        members: dict[int, list[int]] = {}
        for index in self.targets:
            members.setdefault(people[index], []).append(index)
        self.people = list(members.values())
        self._targets = torch.tensor(self.targets, device=self.data.latents.device)

    def index(self, rows: Tensor) -> Tensor:
        """Which scenes the targets `rows` (B,) are."""
        return self._targets[rows.to(self._targets.device)]

    def reference_latents(self, references: list[Reference]) -> Tensor:
        """float32 (B, c, r, r)."""
        chosen = torch.tensor([index for index, _ in references], device=self._targets.device)
        return self.data.crops[chosen].float()

    @torch.no_grad()
    def batch(self, rows: Tensor) -> Batch:
        """As `Pairs.batch`."""
        indices = self.index(rows)
        target = self.data.target[indices]
        boxes = self.data.boxes[indices]
        mine = torch.arange(boxes.shape[1], device=boxes.device) == target[:, None]
        others = torch.where(mine[..., None], torch.nan, boxes)
        places = torch.arange(len(indices), device=indices.device)
        return {
            "latents": self.data.latents[indices].float(),
            "others": others,
            "boxes": boxes[places, target],
            "landmarks5": self.data.landmarks5[indices][places, target],
            TEXT: self.text_encoder(self.data.tokens[indices, PLAIN])[0].float(),
        }


class FaceTask(FaceFusionTask):
    """Trains Face Fusion weights; its pictures are of people set aside."""

    def __init__(self, frozen: Frozen, base: BaseModel, adapter: FaceFusionAdapter, train: Any, held_out: Any) -> None:
        options = FaceFusionOptions(snr_gamma=5.0, keep_noisy=True, face_loss_weight=3.0)
        super().__init__(base, adapter, train, held_out, options)
        self.frozen = frozen

    @torch.compiler.set_stance("force_eager")
    def sample(self, path: Path) -> dict[str, float]:
        """Rows: reference, drawn with it from a plain caption, true picture; and the losses of `FaceFusionTask`."""
        held_out: Any = self.held_out
        rows = torch.tensor([held_out.targets.index(members[0]) for members in held_out.people[:8]])
        batch = held_out.batch(rows)
        latents = held_out.reference_latents(held_out.choose(rows, torch.zeros(len(rows))))
        states = {name: state[:, None].repeat(2, 1, 1, 1) for name, state in self.reference_states(latents).items()}
        seen = torch.arange(2 * len(rows), device=self.device) >= len(rows)  # guidance has rows without a face first
        tokens = held_out.data.tokens[held_out.index(rows), PLAIN]
        with face_fused_unet(self.unet, self.adapter, states, seen):
            drawn = draw(self.frozen, self.unet, tokens)
        save_grid([decoded(self.frozen, latents), drawn, decoded(self.frozen, batch["latents"])], path)
        return super().sample(path)
