"""Equal training of all variants: same pictures in the same order, same noise, same number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...face_adapter import FaceFusionAdapter
from ...face_errors import FaceFusionError
from ...face_files import save_tensors
from ...training.base_model import BaseModel
from ...training.initial_weights import continued_adapter
from ...training.latent_cache import Cache, encode
from ...training.loop import Batch, LoopOptions, train
from ...training.objective import FaceEmbedder, load_face_embedder
from ...training.pairs import Pairs, Reference, split_people
from ...training.preparation import has_partner, read_report, read_rows
from ...training.run_records import read_records
from ...training.task import FaceFusionOptions, FaceFusionTask, FeatureCache
from .conditioners import create_conditioning
from .conditioning import Conditioning
from .unet_features import UNetFeatures, with_layers
from .variants import Variant


WEIGHTS_NAME = "weights.safetensors"
OWN = "own_reference"  # what the encoder of a variant takes, in a batch
# As the embedded weights were trained.
LOSS = FaceFusionOptions(
    timestep_power=0.7, snr_gamma=5.0, keep_noisy=True, face_loss_weight=4.0, identity_loss_until=0.95
)


@dataclass(frozen=True)
class Budget:
    """What every variant gets; `rates` are the learning rates of those variants that need another.

    Args:
        identity_loss_weight: above 0 the face embedder of trainings (not one that measures) says at all but the
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
    """The training task with another conditioning in the place of Face Fusion's.

    A variant that goes by the clean reference in the UNet shares its pass with the teacher and, by `feature_cache`,
    with the other variants.
    """

    name = "ablation"

    def __init__(
        self,
        base: BaseModel,
        conditioning: Conditioning,
        train: Pairs,
        validation: Pairs | None = None,
        options: FaceFusionOptions | None = None,
        embedder: FaceEmbedder | None = None,
        **more: Any,
    ) -> None:
        adapter: Any = conditioning.adapter
        super().__init__(base, adapter, train, validation, options, embedder, **more)
        self.conditioning = conditioning

    @property
    def shares(self) -> bool:
        return isinstance(self.conditioning, UNetFeatures) and not self.conditioning.timestep

    @property
    def reference_timestep(self) -> int:
        return 0

    def examples(self, pairs: Pairs, rows: Tensor, references: list[Reference]) -> Batch:
        seen = self.shares or (self.teacher is not None and pairs is self.pairs)
        batch = super().examples(pairs, rows, references) if seen else pairs.batch(rows)
        if not self.shares:
            batch[OWN] = self.conditioning.from_data(pairs, references)
        return batch

    def identity_tokens(self, batch: Batch) -> dict[str, Tensor]:
        seen = self.shares or (self.teacher is not None and self.training)
        return super().identity_tokens(batch) if seen else {}

    def fused(self, batch: Batch, tokens: dict[str, Tensor]) -> AbstractContextManager[None]:
        if isinstance(self.conditioning, UNetFeatures) and self.shares:
            states = self.conditioning.chosen({name: state[:, 0] for name, state in tokens.items()})
        else:
            states = self.conditioning.states(batch[OWN])
        one_each = {name: state.unsqueeze(1) for name, state in states.items()}
        return self.conditioning.applied(one_each, batch["has_face"])

    def export(self, folder: Path) -> None:
        save_tensors(folder / WEIGHTS_NAME, self.adapter.state_dict(), {"format": "face-fusion-ablation"})


@dataclass
class Trainer:
    """Trains variants for `base` on the prepared folder `data`; the weights lie in `out/VARIANT/seed-N/`.

    Args:
        embedder: of the variant that is conditioned on one, see `encoders.load_conditioner`.
        keep_references: see `FaceFusionOptions`.
        start: a file or folder with the weights of an adapter that all variants begin with; without steps of
            training they are used as they are.
        teacher: a file or folder with the weights of an adapter whose predictions all variants learn.
    """

    base: BaseModel
    data: Path
    out: Path
    budget: Budget
    embedder: str | None = None
    keep_references: bool = False
    start: Path | None = None
    teacher: Path | None = None
    feature_cache: FeatureCache = field(default_factory=FeatureCache)

    @cached_property
    def teaching(self) -> FaceFusionAdapter | None:
        """The weights of the teacher, which sees one photo, the same as the variant."""
        if self.teacher is None:
            return None
        settings = read_report(self.data)["settings"]
        kind = {"reference_timestep": 0, "resolution": settings["reference_resolution"]}
        return continued_adapter(self.base.unet, self.teacher, kind | {"face_crop": settings["face_crop"]})

    @cached_property
    def cache(self) -> Cache:
        return encode(self.data, self.base)

    def trained(self, variant: Variant, seed: int) -> tuple[Conditioning | None, dict[str, Any]]:
        """The conditioning with its weights, trained now or before, and the record of the training.

        Without a face there is none; what is not trained has an empty record.

        Raises:
            FaceFusionError: it was trained with another learning rate, cannot begin with the weights in `start`, or
                cannot learn from a teacher.
        """
        if variant.encoder == "none":
            return None, {}
        torch.manual_seed(seed)
        conditioning = create_conditioning(self.base, variant, self.data, self.embedder)
        if not variant.trained:
            return conditioning, {}
        if self.start is not None:
            self._begin(conditioning, variant, self.start)
        if not self.budget.steps:
            conditioning.adapter.to(self.base.unet.device).eval().requires_grad_(False)
            return conditioning, {}
        if self.teacher is not None and variant.same_photo:
            raise FaceFusionError(
                f"{variant.name} cannot learn from a teacher, who does not copy: leave it out with --variants, or "
                "--teacher"
            )
        folder = self.out / variant.name / f"seed-{seed}"
        if not (folder / "training.json").is_file():  # written last
            self._train(conditioning, variant, seed, folder)
        record = read_records(folder / "training.json")[VariantTask.name]
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

    def _comparable(self, people: list[list[int]]) -> list[list[int]]:
        """Of the examples by person those from which every variant can learn the same.

        Altered crops of people with a single photo are there as latents only, which encoders do not take, and only the
        method itself keeps several people in a picture apart.
        """
        rows = read_rows(self.data)
        partnered = has_partner(rows)
        usable = [
            pair and not row["own_reference"] and not row.get("others")
            for pair, row in zip(partnered, rows, strict=True)
        ]
        found = [[index for index in members if usable[index]] for members in people]
        return [members for members in found if len(members) > 1]

    def _train(self, conditioning: Conditioning, variant: Variant, seed: int, folder: Path) -> None:
        people, aside = (self._comparable(part) for part in split_people(read_rows(self.data), None, seed=0))
        pairs = Pairs(self.data, self.cache, people, same_photo=variant.same_photo)
        held_out = Pairs(self.data, self.cache, aside) if aside else None
        weight = self.budget.identity_loss_weight
        options = replace(LOSS, keep_references=self.keep_references, identity_loss_weight=weight)
        embedder = load_face_embedder("avatars") if weight else None
        task = VariantTask(
            self.base,
            conditioning,
            pairs,
            held_out,
            options,
            embedder,
            teacher=self.teaching,
            feature_cache=self.feature_cache,
        )
        train(task, self.budget.loop(variant, seed), folder)
