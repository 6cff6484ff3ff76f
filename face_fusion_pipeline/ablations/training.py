"""Equal training of all variants: same pictures in the same order, same noise, same number of steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..face_adapter import save_tensors
from ..face_errors import FaceFusionError
from ..finetuning.base_model import BaseModel
from ..finetuning.initial_weights import continued_adapter
from ..finetuning.latent_cache import Cache, encode
from ..finetuning.objective import Recogniser, load_recogniser
from ..finetuning.pairs import Pairs, split_people
from ..finetuning.preparation import read_rows
from ..finetuning.task import FaceFusionOptions, FaceFusionTask
from ..training.loop import Batch, LoopOptions, train
from .conditioning import Conditioning, UNetFeatures, create_conditioning, with_layers
from .variants import Variant


WEIGHTS_NAME = "weights.safetensors"
# As the embedded weights were trained.
LOSS = FaceFusionOptions(
    timestep_power=0.7, snr_gamma=5.0, keep_noisy=True, face_loss_weight=4.0, identity_loss_until=0.95
)


@dataclass(frozen=True)
class Budget:
    """What every variant gets; `rates` are the learning rates of those variants that need another.

    Args:
        identity_loss_weight: above 0 the recogniser of trainings (not one that measures) says at all but the
            noisiest steps whether it is the person, as in the training of the embedded weights.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    precision: str = "no"
    identity_loss_weight: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate(self, variant: Variant) -> float:
        return self.rates.get(variant.name, self.learning_rate)

    def loop(self, variant: Variant, seed: int) -> LoopOptions:
        return LoopOptions(
            batch_size=self.batch_size,
            lr=self.rate(variant),
            steps=self.steps,
            warmup=min(100, self.steps // 10),
            ema_decay=0.998,
            seed=seed,
            precision=self.precision,
            sample_minutes=1e9,  # held-out losses at the end only
        )


class VariantTask(FaceFusionTask):
    """The training task with another conditioning in the place of Face Fusion's."""

    name = "ablation"

    def __init__(
        self,
        base: BaseModel,
        conditioning: Conditioning,
        train: Pairs,
        validation: Pairs | None = None,
        options: FaceFusionOptions | None = None,
        recogniser: Recogniser | None = None,
    ) -> None:
        super().__init__(base, conditioning.adapter, train, validation, options, recogniser)  # type: ignore[arg-type]
        self.conditioning = conditioning

    def reference_inputs(self, pairs: Pairs, references: list[tuple[int, int]]) -> Tensor:
        return self.conditioning.from_data(pairs, references)

    def reference_states(self, latents: Tensor) -> dict[str, Tensor]:
        return self.conditioning.states(latents)

    def fused(self, batch: Batch) -> AbstractContextManager[None]:
        return self.conditioning.applied(self.identity_tokens(batch), batch["has_face"])

    def export(self, folder: Path) -> None:
        save_tensors(folder / WEIGHTS_NAME, self.adapter.state_dict(), {"format": "face-fusion-ablation"})


@dataclass
class Trainer:
    """Trains variants for `base` on the prepared folder `data`; the weights lie in `out/VARIANT/seed-N/`.

    Args:
        recogniser: of the variant that is conditioned on one, see `encoders.load_recogniser`.
        keep_references: see `FaceFusionOptions`.
        start: a file or folder with the weights of an adapter that all variants begin with; without steps of
            training they are used as they are.
    """

    base: BaseModel
    data: Path
    out: Path
    budget: Budget
    recogniser: str | None = None
    keep_references: bool = False
    start: Path | None = None

    @cached_property
    def cache(self) -> Cache:
        return encode(self.data, self.base)

    def trained(self, variant: Variant, seed: int) -> tuple[Conditioning | None, dict[str, Any]]:
        """The conditioning with its weights, trained now or before, and the record of the training.

        Without a face there is none; what is not trained has an empty record.

        Raises:
            FaceFusionError: it was trained with another learning rate, or cannot begin with the weights in `start`.
        """
        if variant.encoder == "none":
            return None, {}
        torch.manual_seed(seed)
        conditioning = create_conditioning(self.base, variant, self.data, self.recogniser)
        if not variant.trained:
            return conditioning, {}
        if self.start is not None:
            self._begin(conditioning, variant, self.start)
        if not self.budget.steps:
            conditioning.adapter.to(self.base.unet.device).eval().requires_grad_(False)
            return conditioning, {}
        folder = self.out / variant.name / f"seed-{seed}"
        if not (folder / "training.json").is_file():  # written last
            self._train(conditioning, variant, seed, folder)
        record = json.loads((folder / "training.json").read_text())[VariantTask.name]
        self.check_rate(variant, seed, record)
        conditioning.adapter.load_state_dict(load_file(folder / WEIGHTS_NAME))
        conditioning.adapter.to(self.base.unet.device).eval().requires_grad_(False)
        return conditioning, record

    def _begin(self, conditioning: Conditioning, variant: Variant, start: Path) -> None:
        if not isinstance(conditioning, UNetFeatures) or variant.init != "attn1":
            raise FaceFusionError(
                f"{variant.name} cannot begin with the weights of an adapter, it is about others: leave it out with "
                "--variants, or train everything from the beginning without --init-adapter"
            )
        asked = {"resolution": conditioning.resolution, "face_crop": conditioning.face_crop}
        given = with_layers(continued_adapter(self.base.unet, start, asked), conditioning.layers)
        conditioning.adapter.load_state_dict(given.state_dict())

    def check_rate(self, variant: Variant, seed: int, record: Mapping[str, Any]) -> None:
        """Raises [`FaceFusionError`] for the record of a training with another learning rate."""
        rate, asked = record["options"]["lr"], self.budget.rate(variant)
        if rate != asked:
            raise FaceFusionError(
                f"{self.out / variant.name / f'seed-{seed}'} was trained with learning rate {rate:g}, not {asked:g}: "
                "move it away, or choose another --out"
            )

    def _train(self, conditioning: Conditioning, variant: Variant, seed: int, folder: Path) -> None:
        people, aside = split_people(read_rows(self.data), None, seed=0)
        pairs = Pairs(self.data, self.cache, people, same_photo=variant.same_photo)
        held_out = Pairs(self.data, self.cache, aside) if aside else None
        weight = self.budget.identity_loss_weight
        options = replace(LOSS, keep_references=self.keep_references, identity_loss_weight=weight)
        recogniser = load_recogniser("avatars") if weight else None
        task = VariantTask(self.base, conditioning, pairs, held_out, options, recogniser)
        train(task, self.budget.loop(variant, seed), folder)
