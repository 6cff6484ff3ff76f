"""FaceStudio's whole UNet, as in the paper, against its LoRA: both trained alike, with equal time or steps.

What is learned of the UNet is the only difference, and with it the learning rate: a rate that suits a LoRA destroys a
UNet.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...conditioner_face_studio import load_studio_prior
from ...conditioner_tokens import image_encoder_of
from ...evaluation.generation import Settings, hash_weights, pipeline_of
from ...face_adapter import adapter_fingerprint
from ...face_embedders import load_face_embedder
from ...face_files import save_tensors
from ...face_studio import STUDIO, FaceStudio, new_studio
from ...training.base_model import BaseModel, load_base
from ...training.initial_weights import continued_adapter
from ...training.latent_cache import encode
from ...training.loop import Batch, LoopOptions, process_group, train, usable_precision
from ...training.pairs import Pairs, split_people
from ...training.preparation import data_key, read_rows
from ...training.run_records import RECORD, read_records
from ...training.studio import StudioOptions, StudioTask, fit_to_captions
from ...training.studio_cache import Embeddings, encode_embeddings
from ...unet_family import unet_fingerprint


LORA, WHOLE = "LoRA", "whole UNet"
VARIANTS = (LORA, WHOLE)
UNET_NAME = "unet.safetensors"
# As the embedded weights were trained: half of the pictures are covered then, and none where they are used.
OPTIONS = StudioOptions(
    timestep_power=0.7, face_loss_weight=4.0, style_dropout=0.5, whole_pictures=0.5, appended=0.4, teacher_weight=1.0
)
MASK, TOKENS, RANK = 1.5, 8, 32
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class WholeStudioTask(StudioTask):
    """The weights of the UNet itself learn, and FaceStudio's Linear with them.

    Args:
        frozen: the base as it was, which a teacher's weights are for.
    """

    name = "face-studio-whole"

    def __init__(self, base: BaseModel, *args: Any, frozen: BaseModel, **more: Any) -> None:
        super().__init__(base, *args, **more)
        self.unet.requires_grad_(True)
        self.frozen, self.frozen_unet = frozen, frozen.unet  # a part of the task moves with it

    @torch.no_grad()
    def taught(self, batch: Batch, noisy: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        learning = self.base, self.unet
        self.base, self.unet = self.frozen, self.frozen_unet
        try:
            return super().taught(batch, noisy, tokens)
        finally:
            self.base, self.unet = learning

    def export(self, folder: Path) -> None:
        """Write the Linear as users' weights are written, and beside it the UNet's own weights."""
        super().export(folder)
        own = {name: weight for name, weight in self.unet.state_dict().items() if not name.startswith(f"{STUDIO}.")}
        save_tensors(folder / UNET_NAME, own, {"format": "face-fusion-ablation"})


@dataclass(frozen=True)
class StudioBudget:
    """What both get; one of `steps` and `minutes` is the length.

    Args:
        learning_rate, whole_learning_rate: of the LoRA's training and of the whole UNet's.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    whole_learning_rate: float = 1e-4
    precision: str = "no"

    def loop(self, variant: str, seed: int) -> LoopOptions:
        return LoopOptions(
            batch_size=self.batch_size,
            lr=self.learning_rate if variant == LORA else self.whole_learning_rate,
            steps=self.steps,
            minutes=self.minutes,
            warmup=50 if self.steps is None else min(50, self.steps // 10),
            clip_norm=0.3,
            ema_decay=0.995,
            seed=seed,
            precision=self.precision,
            sample_minutes=1e9,  # held-out losses at the end only
        )


@dataclass
class StudioTrainer:
    """Trains both on the prepared folder `data`; the weights lie in `out/VARIANT/seed-N/`.

    Args:
        model: the base, a folder or Hub id.
        parts: where the prior and the face embedder lie, as beside FaceStudio's weights.
        teacher: Face Fusion weights whose predictions both learn; None: they learn the noise.
    """

    model: str
    data: Path
    out: Path
    budget: StudioBudget
    parts: str
    teacher: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What all trainings in one folder have in common; raises errors for parts that are missing."""
        load_studio_prior(self.parts)  # else known after the first training
        unet, teacher = load_base(self.model).unet, None
        if self.teacher is not None:
            teacher = adapter_fingerprint(continued_adapter(unet, self.teacher, {}))
        known = {"model": Path(self.model).name, "unet": unet_fingerprint(unet), "data": data_key(self.data)}
        embedder = load_face_embedder(self.parts).name
        return {**known, "teacher": teacher, "face_embedder": embedder, "budget": asdict(self.budget)}

    def trained(self, variant: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The folder of the weights, trained now or before, and the record of the training."""
        folder = self.out / variant.replace(" ", "-") / f"seed-{seed}"
        if not (folder / RECORD).is_file():  # written last
            train(self.task(variant, seed), self.budget.loop(variant, seed), folder)
        (record,) = read_records(folder / RECORD).values()
        return folder, record

    def task(self, variant: str, seed: int) -> StudioTask:
        """The training of one of `VARIANTS`; both begin with the same Linear."""
        base = self._base()
        encoder, processor = image_encoder_of(base.pipeline, FaceStudio)
        embedder, cache, rows = load_face_embedder(self.parts), encode(self.data, base), read_rows(self.data)
        made = encode_embeddings(self.data, base, cache, encoder, embedder, mask=MASK, processor=processor)
        people, aside = split_people(rows, None, seed=0)
        pairs, held_out = Pairs(self.data, cache, people), Pairs(self.data, cache, aside) if aside else None
        embeddings = Embeddings(made, len(rows))
        dtype = DTYPES.get(usable_precision(self.budget.precision), torch.float32)
        if variant == LORA:
            base.cast(dtype)  # what is frozen; what learns stays as it is
        studio = new_studio(
            base.unet,
            image_width=encoder.config.projection_dim,
            face_width=embedder.width,
            face_embedder=embedder.name,
            tokens=TOKENS,
            rank=RANK if variant == LORA else 0,
            picture_mask=0.0,
        )
        torch.manual_seed(seed)
        fit_to_captions(studio.float(), pairs, embeddings)
        options = OPTIONS if self.teacher is not None else replace(OPTIONS, teacher_weight=0.0)
        teacher = None if self.teacher is None else continued_adapter(base.unet, self.teacher, {})
        given: Any = (base, studio, pairs, embeddings, held_out, options, teacher)
        if variant == LORA:
            return StudioTask(*given)
        frozen = self._base()
        frozen.cast(dtype)
        return WholeStudioTask(*given, frozen=frozen)

    def _base(self) -> BaseModel:
        base = load_base(self.model)
        base.pipeline.to(process_group().device)  # where the training will be
        return base

    def pipeline(self, folder: Path, settings: Settings, device: str) -> tuple[Any, Settings]:
        """What draws with the weights in `folder`, and `settings` that know them."""
        settings = replace(settings, weights_hash=hash_weights(settings.model, str(folder)))
        pipe = pipeline_of(settings, device)
        pipe.load_face_studio(folder, prior=self.parts, face_embedder=self.parts)
        if (folder / UNET_NAME).is_file():
            left = pipe.unet.load_state_dict(load_file(folder / UNET_NAME), strict=False)
            assert not left.unexpected_keys and all(name.startswith(f"{STUDIO}.") for name in left.missing_keys)
        return pipe, settings
