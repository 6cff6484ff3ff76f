"""The Face Fusion adapter: `to_k_face` and `to_v_face` alone, on pairs of renders of one identity.

The target is one image of a person, the reference the face crop of another image of that person, so that copying the
reference's pose and expression never pays. The reference pass is frozen and has no random part, hence the hidden
states of all references are computed once, before training, and kept in float16.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm.auto import tqdm

from ..face_adapter import (
    ADAPTER_WEIGHTS_NAME,
    AdapterMetadata,
    FaceFusionAdapter,
    create_adapter,
    face_fused_unet,
    load_adapter,
    read_tensors,
    save_adapter,
)
from ..face_identity import capture_hidden_states, noise_latents
from .data import AvatarImages, cached, crop_boxes, save_grid
from .loop import Batch, Task, TrainingError, seeded
from .unet import DiffusionLoss, Frozen, LatentData, fingerprint, plain_attention_on_cpu


FACE_CROP = 1.6
TEXT_DROPOUT, FACE_DROPOUT, BOTH_DROPOUT = 0.05, 0.05, 0.05
TIMESTEP_POWER = 0.6  # a nearly clean picture shows who it is already: the reference has most to say about noisy ones
PREFIX = "state "


@dataclass(frozen=True)
class AdapterOptions:
    """`file` is where the adapter goes, by default `face_fusion_adapter.safetensors` in the model folder."""

    init: str = "attn1"
    reference_timestep: int = 0
    token_count_bias: bool = False
    face_loss_weight: float = 3.0
    file: Path | None = None


class References:
    """Reference face crops of a dataset's single-person images, and their hidden states in the frozen UNet."""

    def __init__(self, frozen: Frozen, unet: UNet2DConditionModel, data: AvatarImages, timestep: int) -> None:
        self.data, self.boxes = data, data.first_boxes
        self.by_identity: dict[int, list[int]] = defaultdict(list)
        for index, record in enumerate(data.records):
            if len(record["identities"]) == 1:
                self.by_identity[record["identities"][0]].append(index)
        self.by_identity = {key: members for key, members in self.by_identity.items() if len(members) > 1}
        targets = sorted(index for members in self.by_identity.values() for index in members)
        self.targets = torch.tensor(targets, dtype=torch.long)
        if not len(self.targets):
            raise TrainingError(
                f"{data.folder} has no identity with two single-person images, so there is no pair to learn from: "
                "make the dataset with several images per identity"
            )
        self.rows = torch.full((len(data),), -1).scatter(0, self.targets, torch.arange(len(self.targets)))
        self.states = self._encode(frozen, unet, timestep)

    def crops(self, indices: Tensor, device: torch.device | str) -> Tensor:
        """Face crops (B, 3, S, S) in [-1, 1] of images `indices`."""
        images = self.data.images(indices, device)
        return crop_boxes(images, self.boxes[indices].to(device), images.shape[-1], FACE_CROP)

    def _encode(self, frozen: Frozen, unet: UNet2DConditionModel, timestep: int) -> dict[str, Tensor]:
        """Layer name -> float16 (targets, N_f, C)."""
        device = unet.device
        parts = self.targets.split(32)
        key = f"{self.data.key}/{fingerprint(frozen.vae.encoder)}/{frozen.vae.config.scaling_factor}/{FACE_CROP}"
        latents = cached(
            self.data.folder / "reference_latents.safetensors",
            key,
            lambda: torch.cat([frozen.latents(self.crops(part, device)).half().cpu() for part in parts]),
        )
        alphas = DiffusionLoss(1.0).alphas
        empty = frozen.text_states([""]).to(device).float()
        states: dict[str, Tensor] = {}
        start = 0
        for part in tqdm(latents.split(32), desc="reference pass", unit="batch"):
            noised = noise_latents(part.to(device).float(), alphas, timestep)
            for name, state in capture_hidden_states(unet, noised, timestep, empty).items():
                if name not in states:
                    states[name] = torch.empty(len(latents), *state.shape[1:], dtype=torch.float16)
                states[name][start : start + len(part)] = state.cpu()
            start += len(part)
        return states

    def other_image(self, target: int, draw: float) -> int:
        """Another image of the person of image `target`, chosen by `draw` in [0, 1)."""
        members = self.by_identity[self.data.records[target]["identities"][0]]
        others = [index for index in members if index != target]
        return others[int(draw * len(others))]

    def tokens(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Layer name -> hidden states (B, 1, N_f, C): one reference each."""
        rows = self.rows[indices]
        return {name: state[rows].to(device).float().unsqueeze(1) for name, state in self.states.items()}


def continued_adapter(unet: UNet2DConditionModel, path: Path, metadata: Mapping[str, object]) -> FaceFusionAdapter:
    """The weights of a file in float32, to be trained on; raises `TrainingError` where its metadata are others."""
    tensors, strings = read_tensors(path)
    stored = AdapterMetadata.from_strings(strings)
    changed = [name for name, value in metadata.items() if getattr(stored, name) != value]
    if changed:
        raise TrainingError(
            f"{path} has {changed[0]} {getattr(stored, changed[0])}, not {metadata[changed[0]]}: "
            "give the same option to go on from it"
        )
    return load_adapter(unet, {key: value.float() for key, value in tensors.items()}, stored)


class AdapterTask(Task):
    """Trains a new adapter, or the one in the folder `source`, for the frozen `unet`."""

    name = "adapter"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        frozen: Frozen,
        train: AvatarImages,
        validation: AvatarImages,
        options: AdapterOptions,
        source: Path | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.frozen, self.options = unet.requires_grad_(False).eval(), frozen, options
        if options.file:
            self.name = f"adapter-{options.file.stem}"  # several variants on one base keep separate logs
        self.vae, self.text_encoder = frozen.vae, frozen.text_encoder
        self.adapter = self._create(train.pixels.shape[-1], source)
        self.data, self.held_out = LatentData(frozen, train), LatentData(frozen, validation)
        self.references = References(frozen, unet, train, options.reference_timestep)
        self.held_out_references = References(frozen, unet, validation, options.reference_timestep)
        self.validation, self.size = validation, len(self.references.targets)
        self.loss = DiffusionLoss(options.face_loss_weight, TIMESTEP_POWER)

    def _create(self, resolution: int, source: Path | None) -> FaceFusionAdapter:
        metadata = {
            "reference_mode": "noised" if self.options.reference_timestep else "clean",
            "reference_timestep": self.options.reference_timestep,
            "token_count_bias": self.options.token_count_bias,
            "face_crop": FACE_CROP,
            "resolution": resolution,
        }
        if source is None:
            return create_adapter(self.unet, self.options.init, metadata=metadata)
        return continued_adapter(self.unet, source / ADAPTER_WEIGHTS_NAME, metadata)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        draws = torch.rand(2, len(indices), generator=generator, device=generator.device)
        targets = self.references.targets[indices]
        pairs = zip(targets.tolist(), draws[0].tolist(), strict=True)
        others = torch.tensor([self.references.other_image(target, draw) for target, draw in pairs])
        batch = self.examples(self.data, self.references, targets, others)
        batch |= self.loss.draw(batch["latents"].shape, generator)
        # One draw decides: [text | both | face | none dropped], so that the three cases exclude each other.
        no_text = draws[1] < TEXT_DROPOUT + BOTH_DROPOUT
        no_face = (draws[1] >= TEXT_DROPOUT) & (draws[1] < TEXT_DROPOUT + BOTH_DROPOUT + FACE_DROPOUT)
        batch["text"] = torch.where(no_text[:, None, None], self.empty_text(), batch["text"])
        batch["has_face"] = ~no_face
        return batch

    def empty_text(self) -> Tensor:
        return self.data.empty_text.to(self.device).float()

    def examples(self, data: LatentData, references: References, targets: Tensor, others: Tensor) -> Batch:
        """Latents, text and face boxes of the images `targets`, reference states of the images `others`."""
        tokens = references.tokens(others, self.device)
        return {
            "latents": data.latents[targets].to(self.device).float(),
            "text": data.text[data.caption_ids[targets]].to(self.device).float(),
            "faces": data.face_masks[targets].to(self.device),
            "has_face": torch.ones(len(targets), dtype=torch.bool, device=self.device),
            **{PREFIX + name: state for name, state in tokens.items()},
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        noisy, target = self.loss.noised(batch)
        with self.fused(reference_tokens(batch), batch["has_face"]), plain_attention_on_cpu():
            predicted = self.unet(noisy, batch["timesteps"], batch["text"]).sample
        return self.loss.per_image(predicted, target, batch).mean(), {}

    @contextmanager
    def fused(self, tokens: dict[str, Tensor], has_face: Tensor) -> Iterator[None]:
        with face_fused_unet(self.unet, self.adapter, tokens, has_face):
            yield

    def sample(self, path: Path) -> dict[str, float]:
        """Rows: references, without face, with face, other true image; and the loss with right, wrong and no face.

        The wrong face is that of another held-out person; noise and targets are the same in all three.
        """
        people = list(self.held_out_references.by_identity.values())
        self._sample_grid(people[:8], path)
        targets, others = (torch.tensor([members[i] for members in people[:128]]) for i in (0, 1))
        losses = {}
        for kind, references in (("right", others), ("wrong", others.roll(1)), ("no", others)):
            batch = self.examples(self.held_out, self.held_out_references, targets, references)
            batch |= self.loss.draw(batch["latents"].shape, seeded(0, 0, "validation", self.device))
            if kind == "no":
                batch["has_face"] = torch.zeros_like(batch["has_face"])
            losses[f"validation_loss_{kind}_face"] = float(self.forward(batch)[0])
        return losses

    def _sample_grid(self, people: list[list[int]], path: Path) -> None:
        targets, others = (torch.tensor([members[i] for members in people]) for i in (0, 1))
        prompts = [self.validation.captions[int(i)] for i in targets]
        tokens = self.held_out_references.tokens(others, self.device)
        tokens = {name: torch.cat([state, state]) for name, state in tokens.items()}
        pipe = self.frozen.pipeline(self.unet)
        rows = [self.held_out_references.crops(others, self.device)]
        for with_face in (False, True):
            # Guidance puts the unconditional half first; it has no face.
            first_with_face = len(people) if with_face else 2 * len(people)
            has_face = torch.arange(2 * len(people), device=self.device) >= first_with_face
            with self.fused(tokens, has_face):
                output = pipe(
                    prompts,
                    num_inference_steps=20,
                    guidance_scale=4.0,
                    generator=seeded(0, 0, "sample"),
                    output_type="pt",
                )
            rows.append(output.images * 2 - 1)
        save_grid([*rows, self.validation.images(targets)], path)

    def export(self, folder: Path) -> None:
        path = self.options.file or folder / ADAPTER_WEIGHTS_NAME
        os.makedirs(path.parent, exist_ok=True)
        save_adapter(copy.deepcopy(self.adapter).half(), path)


def reference_tokens(batch: Batch) -> dict[str, Tensor]:
    """The reference states of a batch by layer name."""
    return {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
